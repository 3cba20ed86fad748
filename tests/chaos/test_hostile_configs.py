"""Settings without sense: a model or one sentence, before any memory of the model's size is taken."""

import math
import os
import random
import time
import tracemalloc

import pytest
import torch

from recurlm import api
from recurlm.config import (
    MAX_LIST,
    SECTIONS,
    Config,
    apply_assignments,
    from_dict,
    from_toml,
    load_recipe,
    to_dict,
    to_toml,
)
from recurlm.errors import ConfigError, RunError, UserError
from recurlm.model.neural import NeuralModel
from recurlm.training import memory
from recurlm.training.optimizers import OPTIMIZERS
from recurlm.training.settings import check_settings
from support import counts, record, tiny_config

pytestmark = pytest.mark.chaos

VALUES = [
    0, -1, 1, 2, 7, 65_536, 65_537, 2**31, 2**63, 10**12, 10**30, 10**4000, -(10**4000), 0.0, -0.0, 0.5, 1e308, -1e308, 1e-320,
    math.nan, math.inf, -math.inf, True, False, None, "", "1", "1e400", "nan", "lstm", "os.system",
    "../../etc/passwd", "a" * 100_000, "\0", "\ud800", "\n\nrecurlm: ok", "'; import os", [], {}, [[]], [1], [1, "2"], [1.5, True],
    [0.9, 0.999], [10**12] * 3, [9] * 300, [1] * 200_000, {"a": 1}, b"bytes", object(), print, Config, [None] * 5,
    "auto", "cuda:99", "cuda:-1", "cpu:7", "meta", "mps",
]  # fmt: skip
DEEP: list = []
for _ in range(20_000):
    DEEP = [DEEP]
VALUES.append(DEEP)


def draw_settings(draw: random.Random) -> dict:
    """Sections and keys, most of which exist, with values that mostly cannot work."""
    out: dict = {}
    for _ in range(draw.randrange(1, 4)):
        section = draw.choice([*SECTIONS, "", "Model", "stages", "a" * 5000])
        if draw.random() < 0.1 or section not in SECTIONS:
            out[section] = draw.choice(VALUES)
            continue
        defaults = to_dict(Config())[section]
        for _ in range(draw.randrange(1, 4)):
            key = (
                draw.choice([*defaults, "lr ", "x" * 5000])
                if draw.random() < 0.9
                else draw.choice(["", "__class__", "help"])
            )
            if draw.random() < 0.6:  # a setting that works, so that others are reached
                out.setdefault(section, {})
                value = defaults.get(key, 1)
                if type(value) is int:
                    value = draw.choice([value, value + 1, max(1, value // 2)])
                if isinstance(out[section], dict):
                    out[section][key] = value
                continue
            same = [value for value in VALUES if type(value) is type(defaults.get(key))]
            value = draw.choice(same) if same and draw.random() < 0.6 else draw.choice(VALUES)
            if isinstance(out.setdefault(section, {}), dict):
                out[section][key] = value
    return out


def test_any_settings_give_a_model_or_one_sentence():
    """Also the absurd: every check, then the model on the meta device, holds less than 1 MB a configuration."""
    number, models, draw = counts(300, 2000), 0, random.Random(7)
    check_settings(Config())  # imports and compiles what it does
    sentences, peak, slowest = set(), 0, 0.0
    for _ in range(number):
        values = draw_settings(draw)
        tracemalloc.start()
        started = time.perf_counter()
        try:
            config = from_dict(values)
            check_settings(config)
            with torch.device("meta"):
                parameters = list(NeuralModel(config.model, 1000, torch.Generator("cpu")).parameters())
            assert from_toml(to_toml(config), "again") == config
            assert all(p.device.type == "meta" for p in parameters)
            models += 1
        except ConfigError as error:
            text = str(error)
            assert 10 < len(text) < 1200 and text.isprintable() and text[-1] in ".?", text[:300]
            sentences.add(text[:40])
        slowest = max(slowest, time.perf_counter() - started)
        layers = len(parameters) if models else 0
        peak = max(peak, tracemalloc.get_traced_memory()[1] - 4000 * layers)  # a module's own objects
        tracemalloc.stop()
    assert peak < 4 << 20, f"{peak:,} bytes"
    assert slowest < 5
    assert models > number // 50 and len(sentences) > number // 20
    record(
        "hostile_configs", configs=number, models=models, refused=number - models, peak_bytes=peak, slowest_s=slowest
    )


@pytest.mark.parametrize(
    "text",
    [
        "[model]\nhidden_size = " + "9" * 5000,
        "[model]\nhidden_size = 0x" + "f" * 5000,
        "[model]\nhidden_sizes = " + "[" * 100_000,
        "[model]\nhidden_sizes = [" + "1," * 100_000 + "]",
        "[model" + ".a" * 5000 + "]\nb = 1",
        "[model]\n" + "a." * 5000 + "b = 1",
        "[optimizer]\nlr = nan",
        "[optimizer]\nlr = -inf",
        "[optimizer]\nlr = 1e400",
        "[optimizer]\nlr = 1\nlr = 2",
        "[data]\npath = 1979-05-27T07:32:00Z",
        "[[data]]\nbptt = 3",
        "data = 3",
        '[data]\npath = "\\ud800"',
        "\0",
        "\ufeff[data]",
        "!!python/object/apply:os.system ['true']",
    ],
    ids=lambda text: ascii(text[:30]),
)
def test_hostile_toml_is_refused_in_one_sentence(text):
    with pytest.raises(ConfigError) as caught:
        from_toml(text, "x.toml")
    assert str(caught.value).startswith("x.toml: ") and len(str(caught.value)) < 500 and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "value", ["9" * 5000, "0x" + "f" * 5000, "[" * 50_000, "nan", '"\\ud800"', "1979-05-27", "{a=1}"]
)
def test_hostile_assignments_are_refused(value):
    with pytest.raises(ConfigError) as caught:
        apply_assignments(Config(), [f"model.hidden_size={value}"])
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("odd", ["folder", "fifo", "large", "bytes", "loop"])
def test_odd_configuration_files(odd, tmp_path):
    path = tmp_path / "x.toml"
    if odd == "folder":
        path.mkdir()
    elif odd == "fifo":
        os.mkfifo(path)
    elif odd == "large":
        path.write_text("#" * (2 << 20))
    elif odd == "bytes":
        path.write_bytes(b"\xff\xfe")
    else:
        path.symlink_to(path)
    with pytest.raises(ConfigError, match=r"x\.toml"):
        load_recipe(str(path))


def test_lists_have_an_end():
    for section in SECTIONS:
        for key, value in to_dict(Config())[section].items():
            if isinstance(value, list):
                with pytest.raises(ConfigError, match=f"at most {MAX_LIST}"):
                    from_dict({section: {key: [1] * (MAX_LIST + 1)}})


def test_a_model_larger_than_the_memory_is_refused_before_it_is_made(store, tmp_path):
    settings = ("model.hidden_size=65536", "model.num_layers=256", "model.embedding_size=65536")
    config = apply_assignments(tiny_config(*settings), [f'data.path="{store.path}"'])
    started = time.perf_counter()
    with pytest.raises(
        RunError, match=r"parameters: with their gradients and adamw's state they need [\d,.]+ GB, but"
    ) as caught:
        api.train(config, tmp_path / "run", quiet=True)
    assert caught.value.exit_code == 1
    assert time.perf_counter() - started < 30
    assert not (tmp_path / "run").exists()
    with pytest.raises(UserError, match="GB are free"):
        api.plan(config)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_memory_named_is_what_training_takes(name, store, tmp_path, monkeypatch):
    """Weights, gradients and moments counted by hand; a byte less is refused, as much is not."""
    config = tiny_config(f"optimizer.name={name}")
    model = NeuralModel(config.model, store.vocab_size, torch.Generator())
    parameters = list(model.parameters())
    optimizer = OPTIMIZERS[name](parameters, config.optimizer)
    for p in parameters:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    kept = [t for state in optimizer.state.values() for t in state.values() if isinstance(t, torch.Tensor)]
    bytes_held = sum(t.numel() * t.element_size() for t in [*parameters, *parameters, *kept])
    monkeypatch.setattr(memory, "available", lambda device: bytes_held)
    memory.check(config, store.vocab_size)
    monkeypatch.setattr(memory, "available", lambda device: bytes_held - 1)
    with pytest.raises(RunError):
        memory.check(config, store.vocab_size)


def test_the_memory_free_is_known_here():
    free = memory.available(torch.device("cpu"))
    assert free == math.inf or 1 << 20 < free < 1 << 50
