"""Token ids as parallel streams cut into windows. The position is one integer; nothing else needs saving.

Shapes: T time, B streams. Stream b predicts a contiguous piece of the text, and its state is carried from
window to window.
"""

from __future__ import annotations

import numpy as np

from recurlm.config import DataConfig


class Streams:
    """`batch_size` contiguous streams over 1-D `ids`.

    exact: every token is predicted, the first from `boundary_id`. All streams have ceil(N / B) targets; when B
    does not divide N the later streams start a little early and repeat their predecessor's last targets, which
    `counted` marks, so that each target counts once.
    published (awd-lstm-lm): floor(N / B) tokens a stream, the remainder dropped; a stream's first token is never
    predicted, and training stops before a last window of a single target.
    """

    def __init__(self, ids: np.ndarray, batch_size: int, boundary_id: int, counting: str = "exact"):
        self.ids, self.boundary_id, self.exact = ids, boundary_id, counting == "exact"
        streams = np.arange(batch_size, dtype=np.int64)
        if self.exact:
            self.length = -(-len(ids) // batch_size)
            self.owned = streams * self.length
            self.starts = np.minimum(self.owned, len(ids) - self.length)
            self.targets = len(ids)
        else:
            rows = len(ids) // batch_size
            self.length = max(rows - 1, 0)
            self.owned = self.starts = streams * rows + 1
            self.targets = batch_size * self.length
        self.train_length = self.length if self.exact else max(self.length - 1, 0)

    def window(self, position: int, steps: int) -> tuple[np.ndarray, np.ndarray]:
        """(inputs_TB, targets_TB) as int64 for targets position .. position + steps, cut at the end of the streams."""
        steps = min(steps, self.length - position)
        index_BT = (self.starts + position)[:, None] + np.arange(-1, steps)
        block_BT = self.ids[np.maximum(index_BT, 0)].astype(np.int64)
        block_BT[index_BT < 0] = self.boundary_id
        block_TB = np.ascontiguousarray(block_BT.T)
        return block_TB[:-1], block_TB[1:]

    def counted(self, position: int, steps: int) -> np.ndarray | None:
        """A mask_TB that is False on repeated targets; None when all of the window's targets count."""
        steps = min(steps, self.length - position)
        mask_TB = (self.starts + position) + np.arange(steps)[:, None] >= self.owned
        return None if mask_TB.all() else mask_TB


def window_length(config: DataConfig, seed: int, step: int) -> int:
    """The window length drawn for one training step: a pure function of seed and step.

    Normal(base, bptt_spread) with base = bptt, or bptt / 2 with probability 1 - bptt_full_share; at least
    bptt_min and at most bptt_cap (Merity et al. 2018, section 5).
    """
    if config.bptt_spread == 0 and config.bptt_full_share == 1:
        return config.bptt
    draw = np.random.Generator(np.random.Philox(key=[seed, step]))
    base = config.bptt if draw.random() < config.bptt_full_share else config.bptt / 2
    length = max(config.bptt_min, int(draw.normal(base, config.bptt_spread)))
    return min(length, config.bptt_cap) if config.bptt_cap else length
