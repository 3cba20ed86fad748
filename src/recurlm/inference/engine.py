"""Inference over ids: batches of sequences with explicit states. Knows no text and no HTTP."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from recurlm.protocol import State, StatefulModel

ROW_TOKENS = 16_384  # tokens scored at once


@torch.inference_mode()
def score_sequences(model: StatefulModel, sequences: Sequence[Sequence[int]], start_id: int) -> list[Tensor]:
    """For each sequence its nll per token in nats (fp32, CPU); every sequence starts fresh from `start_id`.

    Sequences of like length share a batch; padding never reaches a result, for a row's scores depend only on
    what came before in that row.
    """
    results: list[Tensor] = [torch.zeros(0)] * len(sequences)
    order = sorted(range(len(sequences)), key=lambda i: len(sequences[i]))
    while order:
        longest = max(1, len(sequences[order[-1]]))
        rows = order[-max(1, ROW_TOKENS // longest) :]
        del order[-len(rows) :]
        block_TB = torch.full((longest + 1, len(rows)), start_id)
        for column, i in enumerate(rows):
            block_TB[1 : len(sequences[i]) + 1, column] = torch.as_tensor(sequences[i], dtype=torch.long)
        nll_TB = _score_long(model, block_TB)
        for column, i in enumerate(rows):
            results[i] = nll_TB[: len(sequences[i]), column].clone()
    return results


def _score_long(model: StatefulModel, block_TB: Tensor) -> Tensor:
    """nll of rows 1.. of the block given the rows before, in windows of time so that length costs no memory."""
    parts, state, batch = [], model.initial_state(block_TB.shape[1]), block_TB.shape[1]
    window = max(1, ROW_TOKENS // batch)
    block_TB = block_TB.to(model.device)
    for t in range(0, block_TB.shape[0] - 1, window):
        end = min(t + window, block_TB.shape[0] - 1)
        nll_TB, state = model.score(block_TB[t:end], block_TB[t + 1 : end + 1], state)
        parts.append(nll_TB.float().cpu())
    return torch.cat(parts) if parts else torch.zeros(0, batch)


@torch.inference_mode()
def advance_prompt(model: StatefulModel, ids: Sequence[int], state: State) -> tuple[Tensor, State]:
    """(log_probs_V after the last of `ids`, state) for one row; `ids` must not be empty."""
    for start in range(0, len(ids) - 1, ROW_TOKENS):
        part = torch.as_tensor(ids[start : min(start + ROW_TOKENS, len(ids) - 1)], device=model.device)
        _, state = model.score(part[:, None], part[:, None], state)
    last = torch.as_tensor(ids[-1:], device=model.device)
    log_probs_TBV, state = model.advance(last[:, None], state)
    return log_probs_TBV[-1, 0], state
