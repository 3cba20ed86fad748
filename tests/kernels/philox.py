"""Philox 4x32-10 in numpy (Salmon et al. 2011), and how a Triton test runs without a GPU."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch

CUDA = torch.cuda.is_available()
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


def in_the_interpreter(module, check):
    """Runs `module.check('cpu')` in a process of its own, for TRITON_INTERPRET is read at import."""
    pytest.importorskip("triton", reason="triton is not installed")
    if CUDA:
        pytest.skip("a GPU is here: the compiled kernel is tested instead")
    code = f"import sys; sys.path.insert(0, 'tests/kernels'); import {module} as t; t.{check}('cpu'); print('ok')"
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == "ok", done.stderr
