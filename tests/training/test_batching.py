"""Whole runs over sentences, documents and backward text, and over toy parts that a test adds."""

import json
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from test_run import interrupt_at, run_to_the_end, trace, validations, weights_hash
from torch import nn
from torch.nn.functional import linear

from recurlm import api
from recurlm.config import apply_assignments
from recurlm.errors import ConfigError, RequestError
from recurlm.model.heads import HEADS
from recurlm.model.heads.softmax import SoftmaxHead
from recurlm.model.layers import LAYERS
from recurlm.model.layers.base import RecurrentLayer, uniform
from recurlm.text.tokenizers import TOKENIZERS
from recurlm.text.tokenizers.base import Tokenizer
from recurlm.training.optimizers import OPTIMIZERS
from recurlm.training.schedules import SCHEDULES
from support import small_text, tiny_config


def test_short_sentences_count_no_more_than_their_tokens(tmp_path):
    """A fifth of the lines is empty: a batch of them holds one token a row, and must not weigh as much as one of long lines."""
    lines = small_text(400).splitlines()
    text = tmp_path / "text.txt"
    text.write_text("".join(line + ("\n\n" if n % 4 == 0 else "\n") for n, line in enumerate(lines)))
    run = trained(text, tmp_path / "run", "data.batching=sentence", "train.epochs=12", "optimizer.clip=0")
    probability = 2 ** -api.load(run).score("").total
    assert 0.1 < probability < 0.35
    sample = api.load(run).generate("the", tokens=300, seed=1).splitlines()
    assert sum(line.startswith("the") for line in sample if line) > 0.6 * sum(bool(line) for line in sample)


@pytest.fixture(scope="module")
def documents(tmp_path_factory) -> Path:
    """Documents of one to nine lines, parted by empty ones: the number of windows differs from epoch to epoch."""
    lines, parts = small_text(300).splitlines(), []
    while lines:
        size = 1 + len(parts) * 7 % 9
        parts.append("".join(line + "\n" for line in lines[:size]))
        del lines[:size]
    path = tmp_path_factory.mktemp("documents") / "text.txt"
    path.write_text("\n".join(parts))
    return path


@pytest.mark.parametrize("batching", ["sentence", "document"])
def test_a_killed_run_over_sequences_resumes_bit_for_bit(batching, documents, tmp_path):
    settings = (f"data.batching={batching}", "data.batch_size=8", "train.epochs=3", "train.checkpoint_every=5",
                "train.max_steps=90", "train.log_every=1")  # fmt: skip
    run_to_the_end(tmp_path / "whole", documents, *settings)
    assert interrupt_at(tmp_path / "broken", documents, settings, 23, signal.SIGKILL) == -signal.SIGKILL
    run_to_the_end(tmp_path / "broken", documents, *settings)
    assert len(trace(tmp_path / "whole")) > 40
    assert trace(tmp_path / "broken") == trace(tmp_path / "whole")
    assert validations(tmp_path / "broken") == validations(tmp_path / "whole")
    assert weights_hash(tmp_path / "broken") == weights_hash(tmp_path / "whole")


def trained(text: Path, folder: Path, *settings: str) -> Path:
    more = ("train.epochs=3", "optimizer.lr=0.03", "dropout.embedding=0", *settings)
    config = apply_assignments(tiny_config(*more), [f'data.path="{text}"'])
    api.train(config, folder, quiet=True)
    return folder


def test_sentences_measured_afresh_are_the_sum_of_their_scores(text_file, tmp_path):
    run = trained(text_file, tmp_path / "run", "data.batching=sentence", "train.epochs=12")
    model, text = api.load(run), small_text(30, seed=9)
    whole = api.evaluate(model, data=_file(tmp_path, text), batching="sentence", batch_size=7)
    scores = model.score_all(text.splitlines(), unit="nats")
    assert whole["loss_nats"] == pytest.approx(sum(s.total for s in scores) / whole["targets"], rel=1e-5)
    assert whole["loss_nats"] < 2.0  # of about 3.3 untrained
    assert api.evaluate(model, data=_file(tmp_path, text))["batching"] == "sentence"  # as it was trained
    assert model.perplexity(text) == pytest.approx(whole["ppl"], rel=1e-5)
    carried = api.evaluate(model, data=_file(tmp_path, text), batching="stream")
    assert carried["loss_nats"] != whole["loss_nats"]
    with pytest.raises(RequestError, match="rule for one stream"):
        api.evaluate(model, data=_file(tmp_path, text), batching="sentence", counting="published")
    with pytest.raises(RequestError, match="Did you mean 'sentence'"):
        api.evaluate(model, data=_file(tmp_path, text), batching="sentences")


def _file(folder: Path, text: str) -> Path:
    path = folder / "given.txt"
    path.write_text(text)
    return path


def test_a_backward_model_reads_each_line_from_its_end(text_file, tmp_path):
    forward = api.load(trained(text_file, tmp_path / "forward"))
    backward = api.load(trained(text_file, tmp_path / "backward", "model.backward=true", "train.sample_every=40"))
    assert backward.backward and not forward.backward
    line = "the king sees a bird and the child hears it ."
    scored = backward.score(line)
    assert list(scored.tokens[:-1]) == line.split()
    assert scored.tokens == forward.score(line).tokens
    # What comes before is sure given what follows: "it" follows every second verb, "." every "it".
    words = line.split()
    assert scored.surprisals[words.index("it")] < 1 < scored.surprisals[words.index("king")]
    mirrored = forward.score(" ".join(reversed(words)))
    assert scored.total < mirrored.total / 2  # it is no forward model
    measured = api.evaluate(backward, data=_file(tmp_path, small_text(40, seed=4)))
    assert measured["loss_nats"] < 2.0
    # It writes what comes before: nine words before "it .", begun at the line's start.
    text = backward.generate("hears it .", tokens=30, temperature=0.3, seed=2, stop="\n")
    assert text.endswith(" hears it .") and text.startswith("the ") and "\n" not in text
    assert "".join(backward.stream("hears it .", tokens=30, temperature=0.3, seed=2, stop="\n")) + "hears it ." == text
    with pytest.raises(RequestError, match="reads backward"):
        backward.beam("it .")


def test_the_direction_of_a_run_cannot_change(text_file, tmp_path):
    run = trained(text_file, tmp_path / "run", "train.max_steps=5")
    again = apply_assignments(tiny_config("model.backward=true"), [f'data.path="{text_file}"'])
    with pytest.raises(ConfigError, match=r"model\.\w+ is .* but the run was started"):
        api.train(again, run, resume=True, quiet=True)


def test_the_published_rule_is_for_streams(text_file, tmp_path):
    config = apply_assignments(
        tiny_config("data.batching=sentence", "data.counting=published"), [f'data.path="{text_file}"']
    )
    with pytest.raises(ConfigError, match=r"data\.counting"):
        api.train(config, tmp_path / "run", quiet=True)


def test_a_run_says_when_its_streams_are_shorter_than_a_window(store, tmp_path, capsys):
    tokens = store.info["train"].tokens
    for size, told in ((tokens // 12, False), (tokens // 8, True)):
        config = tiny_config("train.max_steps=1", f"data.batch_size={size}", f'data.path="{store.path}"')
        api.train(config, tmp_path / str(size))
        said = f"streams of {-(-tokens // size)} tokens, less than one window (data.bptt = 12)"
        assert (said in capsys.readouterr().err) == told
    api.train(apply_assignments(config, [f"data.bptt={tokens + 1}"]), tmp_path / "long")
    assert "hardly a step; one of the whole text would be shorter too." in capsys.readouterr().err


def test_dry_run_counts_the_steps_of_sentences(text_file):
    config = apply_assignments(
        tiny_config("data.batching=sentence", "data.batch_size=16"), [f'data.path="{text_file}"']
    )
    facts = api.plan(config)
    lines = facts["tokens"]["train"] // 12
    assert facts["steps_per_epoch"] == -(-lines // 16)


# ---- toy parts: one class (or function) and one entry each ------------------------------------------------------


class Leaky(RecurrentLayer):
    """h_t = 0.9 h_{t-1} + 0.1 tanh(W x_t)."""

    def __init__(self, input_size, hidden_size, generator):
        super().__init__()
        self.input_size, self.hidden_size = input_size, hidden_size
        self.weight = uniform((hidden_size, input_size), input_size**-0.5, generator)

    @classmethod
    def build(cls, input_size, hidden_size, index, config, generator):
        return cls(input_size, hidden_size, generator)

    @property
    def droppable(self) -> nn.Parameter:
        return self.weight

    def initial_state(self, batch, like):
        return (like.new_zeros(batch, self.hidden_size),)

    def forward(self, x_TBI, state, weight, recurrent, generator):
        (h_BH,), rows = state, []
        for new_BH in linear(x_TBI, weight.to(x_TBI.dtype)).tanh():
            h_BH = 0.9 * h_BH + 0.1 * new_BH
            rows.append(h_BH)
        return torch.stack(rows), (h_BH,)


class Sharp(SoftmaxHead):
    """A softmax over doubled logits."""

    def nll(self, hidden_NH, targets_N, embedding_VE, dropout=None):
        return super().nll(2 * hidden_NH, targets_N, embedding_VE)

    def log_probs(self, hidden_NH, embedding_VE):
        return super().log_probs(2 * hidden_NH, embedding_VE)


class Mirrored(Tokenizer):
    """255 less the value of each byte."""

    kind = "toy"
    boundary_id = 255 - ord("\n")
    pieces = tuple(bytes([255 - i]) for i in range(256))

    @classmethod
    def train(cls, texts, config):
        return cls()

    @classmethod
    def from_model(cls, model):
        return cls()

    def to_dict(self):
        return {"model": {"type": "Mirrored", "vocab": {}}}

    def encode_prefix(self, text):
        return 255 - np.frombuffer(text.encode(), np.uint8).astype(np.int64)

    @classmethod
    def cut(cls, text):
        return len(text)


def test_a_toy_of_each_kind_takes_one_class_and_one_entry(text_file, tmp_path, monkeypatch):
    monkeypatch.setitem(LAYERS, "toy", Leaky)
    monkeypatch.setitem(HEADS, "toy", Sharp)
    monkeypatch.setitem(OPTIMIZERS, "toy", lambda p, config: torch.optim.Rprop(p, lr=config.lr))
    monkeypatch.setitem(SCHEDULES, "toy", lambda config, progress: 1 / (1 + progress.step))
    monkeypatch.setitem(TOKENIZERS, "toy", Mirrored)
    toys = ("model.layer=toy", "model.head=toy", "optimizer.name=toy", "schedule.name=toy", "tokenizer.kind=toy")
    config = apply_assignments(tiny_config(*toys, "train.max_steps=12"), [f'data.path="{text_file}"'])
    assert api.train(config, tmp_path / "run", quiet=True).finished
    more = apply_assignments(config, ["train.max_steps=20"])
    assert api.train(more, tmp_path / "run", resume=True, quiet=True).step == 20
    model = api.load(tmp_path / "run")
    assert model.score("the king").total > 0
    assert len(model.generate("the", tokens=5, seed=1)) > 3
    assert json.loads((tmp_path / "run" / "config.json").read_text())["model"]["layer"] == "toy"
    assert api.evaluate(tmp_path / "run", split="valid")["targets"] > 0
