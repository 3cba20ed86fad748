"""Philox 4x32-10 in numpy (Salmon et al. 2011)."""

import numpy as np

LOW = 0xFFFFFFFF


def philox(key, c0, c1=0, c2=0, c3=0):
    """The four words of the counters (broadcast together) as uint64 arrays."""
    k0, k1 = key & LOW, key >> 32 & LOW
    c0, c1, c2, c3 = (np.array(x, dtype=np.uint64) for x in np.broadcast_arrays(c0, c1, c2, c3))
    for _ in range(10):
        a, b = c0 * np.uint64(0xD2511F53), c2 * np.uint64(0xCD9E8D57)
        c0, c1, c2, c3 = b >> 32 ^ c1 ^ np.uint64(k0), b & LOW, a >> 32 ^ c3 ^ np.uint64(k1), a & LOW
        k0, k1 = (k0 + 0x9E3779B9) & LOW, (k1 + 0xBB67AE85) & LOW
    return c0, c1, c2, c3
