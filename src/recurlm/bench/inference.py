"""A small character model on the CPU: scoring and generating text, beside the same weights in plain torch."""

from __future__ import annotations

import random
import string
from collections.abc import Callable
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.nn.functional import cross_entropy

from recurlm.bench.timing import Row, Times, cpu_time
from recurlm.config import ModelConfig, TokenizerConfig
from recurlm.errors import RunError
from recurlm.language_model import LanguageModel
from recurlm.model.neural import NeuralModel
from recurlm.text.tokenizers import train_tokenizer

EMBEDDING, HIDDEN, LAYERS = 128, 512, 2
LINES, CHARACTERS, GENERATED = 32, 128, 100
TOLERANCE = 1e-3  # nats a token, between two orders of the same fp32 sums


class Plain(nn.Module):
    """The model as a textbook has it: torch's Embedding, LSTM and Linear, with the weights of ours."""

    def __init__(self, model: NeuralModel):
        super().__init__()
        self.embedding = nn.Embedding(model.vocab_size, EMBEDDING)
        self.lstm = nn.LSTM(EMBEDDING, HIDDEN, LAYERS)
        self.head = nn.Linear(HIDDEN, model.vocab_size)
        names = dict(model.named_parameters())
        weights = {"embedding.weight": "embedding", "head.weight": "head.weight", "head.bias": "head.bias"}
        parts = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        for n in range(LAYERS):
            weights |= {f"lstm.{part}_l{n}": f"layers.{n}.{part}" for part in parts}
        self.load_state_dict({theirs: names[ours] for theirs, ours in weights.items()})
        self.cells = nn.ModuleList(nn.LSTMCell(EMBEDDING if n == 0 else HIDDEN, HIDDEN) for n in range(LAYERS))
        for n, cell in enumerate(self.cells):
            cell.load_state_dict({part: names[f"layers.{n}.{part}"] for part in parts})

    def nll(self, block_TB: Tensor) -> Tensor:
        """nll_TB of rows 1.. given those before."""
        hidden_TBH, _ = self.lstm(self.embedding(block_TB[:-1]))
        logits_NV = self.head(hidden_TBH).flatten(0, 1)
        return cross_entropy(logits_NV, block_TB[1:].flatten(), reduction="none").view(block_TB[1:].shape)

    def greedy(self, start: int, count: int, forbidden: list[int], *, by_cells: bool) -> list[int]:
        """The most probable next id, `count` times: by one-step calls of nn.LSTM, or by nn.LSTMCell."""
        out, id_1, state = [], torch.tensor([start]), None
        states: list[tuple[Tensor, Tensor] | None] = [None] * LAYERS
        for _ in range(count):
            hidden_BH = self.embedding(id_1)
            if by_cells:
                for n, cell in enumerate(self.cells):
                    hidden_BH, cell_BH = cell(hidden_BH, states[n])
                    states[n] = hidden_BH, cell_BH
            else:
                hidden_TBH, state = self.lstm(hidden_BH[None], state)
                hidden_BH = hidden_TBH[0]
            log_probs_BV = self.head(hidden_BH).log_softmax(-1)
            log_probs_BV[:, forbidden] = -torch.inf
            id_1 = log_probs_BV.argmax(-1)
            out.append(int(id_1))
        return out


def example() -> tuple[LanguageModel, Plain]:
    """The model with random weights, and its twin in plain torch."""
    config = ModelConfig(layer="lstm", head="softmax", embedding_size=EMBEDDING, hidden_size=HIDDEN, num_layers=LAYERS)
    alphabet = string.ascii_letters + string.digits + string.punctuation + " \n"
    tokenizer = train_tokenizer([alphabet], TokenizerConfig(kind="char", byte_fallback=False))
    model = NeuralModel(config, tokenizer.vocab_size, Generator().manual_seed(1)).eval()
    return LanguageModel(model, tokenizer, {}), Plain(model).eval()


@torch.inference_mode()
def rows() -> list[dict[str, Any]]:
    """Time a token: many lines at once, one line, and generating; RunError when the two disagree."""
    model, plain = example()
    draw = random.Random(1)
    lines = ["".join(draw.choices(string.ascii_lowercase + " ", k=CHARACTERS)) for _ in range(LINES)]
    boundary = model.tokenizer.boundary_id
    forbidden = [] if model.tokenizer.unk_id is None else [model.tokenizer.unk_id]
    out = []
    for some in (lines, lines[:1]):
        block_TB = torch.tensor([[boundary, *model.tokenizer.encode_prefix(line).tolist()] for line in some]).T
        theirs = plain.nll(block_TB)
        scored = model.score_all(some, unit="nats", end=False)
        ours = torch.tensor([score.surprisals for score in scored]).T
        if (ours - theirs).abs().max() > TOLERANCE:
            raise RunError("inference: recurlm and plain torch give the same text other losses.")
        times = cpu_time({"ours": _scoring(model, some), "peer": lambda block_TB=block_TB: plain.nll(block_TB)})
        shape, tokens = f"{len(some)} x {CHARACTERS}", len(some) * CHARACTERS
        out.append(_row("score, a token", shape, tokens, times["ours"], "nn.LSTM, ids given", times["peer"]))
    works = {
        "ours": lambda: model.generate(tokens=GENERATED, temperature=0),
        "nn.LSTM loop": lambda: plain.greedy(boundary, GENERATED, forbidden, by_cells=False),
        "nn.LSTMCell loop": lambda: plain.greedy(boundary, GENERATED, forbidden, by_cells=True),
    }
    ours, *others = cpu_time(works, seconds=4.0).items()
    return out + [
        _row("generate, a token", f"1 x {GENERATED}", GENERATED, ours[1], peer, times) for peer, times in others
    ]


def _scoring(model: LanguageModel, lines: list[str]) -> Callable[[], object]:
    return lambda: model.score_all(lines, end=False)


def _row(measure: str, shape: str, tokens: int, ours: Times, peer: str, theirs: Times) -> dict[str, Any]:
    """No limit: on a CPU neither torch's matrix products nor its copies bound what fits its caches."""
    each = ours.median / tokens
    row = Row(
        measure=measure, shape=shape, ours_us=each, peer_us=theirs.median / tokens, peer=peer,
        rate=f"{1e6 / each:,.0f} tokens/s",
    )  # fmt: skip
    return row.as_dict()
