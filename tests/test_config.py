"""Settings: strict in, equal out, recipes with the published sizes."""

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from recurlm.config import (
    Config,
    apply_assignments,
    configure,
    from_dict,
    from_toml,
    load_recipe,
    recipe_names,
    reference_markdown,
    stage,
    to_toml,
)
from recurlm.errors import ConfigError
from recurlm.model.neural import NeuralModel
from recurlm.text.corpora import NAMED_SETS


@pytest.mark.parametrize("name", recipe_names())
def test_recipes_load_and_survive_toml(name):
    config = load_recipe(name)
    assert from_toml(to_toml(config), "test") == config
    assert config != Config()


@pytest.mark.parametrize(
    ("name", "vocab", "parameters"),
    [
        ("awd-lstm-ptb", 10_000, 24_221_600),
        ("awd-qrnn-ptb", 10_000, 24_020_150),
        ("awd-lstm-wt2", 33_278, 33_556_078),
        ("awd-qrnn-wt2", 33_278, 33_354_628),
        (
            "awd-qrnn-wt103",
            267_735,
            153_886_638 - 1203,
        ),  # the published head has 3 tombstones of 400 weights and a bias
    ],
)
def test_recipes_have_the_published_sizes(name, vocab, parameters):
    with torch.device("meta"):
        model = NeuralModel(load_recipe(name).model, vocab, torch.Generator())
    assert sum(p.numel() for p in model.parameters()) == parameters


@pytest.mark.parametrize("name", [n for n in recipe_names() if n.endswith("-fast")])
def test_a_fast_recipe_is_the_published_model_on_the_same_tokens(name):
    fast, published = load_recipe(name), load_recipe(name.removesuffix("-fast"))
    assert (fast.model, fast.tokenizer) == (published.model, published.tokenizer)
    assert fast.published == published.published and fast.train.epochs < published.train.epochs


@pytest.mark.parametrize("name", recipe_names())
def test_a_recipe_names_the_text_of_its_published_figures(name):
    assert load_recipe(name).published.text in NAMED_SETS


def test_assignments_override_in_order_and_take_bare_strings():
    config = apply_assignments(
        Config(),
        ["optimizer.lr=30", "model.layer=qrnn", "model.hidden_sizes=[3, 4]", "train.tensorboard=false"],
    )
    assert (config.optimizer.lr, config.model.layer, config.model.hidden_sizes) == (30.0, "qrnn", (3, 4))
    assert config.train.tensorboard is False
    assert apply_assignments(config, ["optimizer.lr=1e-3", "optimizer.lr=2"]).optimizer.lr == 2


def test_published_figures_go_with_the_model_and_the_tokens_that_they_are_of():
    def shown(recipe, *settings):
        config = configure(recipe, *settings)
        return [(p.valid, p.test, p.unit) for p in (stage(config, n).published for n in range(1 + len(config.stages)))]

    whole = [(61.2, 58.8, "ppl"), (58.8, 56.5, "ppl")]
    assert shown("awd-lstm-ptb", "train.epochs=1", "dropout.output=0", "model.layer=lstm") == whole
    assert shown("awd-lstm-ptb", "model.hidden_sizes=[200, 400]") == [(0, 0, "ppl")] * 2
    assert shown("awd-lstm-ptb", "tokenizer.kind=char") == [(0, 0, "ppl")] * 2
    assert shown("awd-lstm-ptbc", "model.hidden_sizes=[9, 200]") == [(0, 0, "bpc")]  # characters still count in bits
    assert shown("awd-lstm-ptbc", "tokenizer.kind=bpe") == [(0, 0, "ppl")]
    assert shown("awd-lstm-ptbc", "model.zoneout=0.1", "published.test=1.2") == [(0, 1.2, "bpc")]


@given(st.text())
def test_any_string_setting_survives_toml(text):
    try:
        config = from_dict({"data": {"path": text}, "train": {"sample_prompt": text}})
        assert from_toml(to_toml(config), "test") == config
    except UnicodeEncodeError:
        pass


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
SECTION = st.sampled_from(["data", "tokenizer", "model", "dropout", "optimizer", "train", "x"])
KEY = st.sampled_from(
    [
        "path",
        "batch_size",
        "kind",
        "layer",
        "embedding_size",
        "hidden_sizes",
        "lr",
        "betas",
        "epochs",
        "weight",
        "y",
    ]
)


@given(st.dictionaries(SECTION, st.dictionaries(KEY, PLAIN, max_size=3) | PLAIN, max_size=3))
def test_any_settings_give_a_config_or_one_sentence(values):
    try:
        config = from_dict(values)
    except ConfigError as error:
        assert str(error)
    else:
        assert isinstance(config, Config)


def test_the_reference_page_is_up_to_date():
    page = Path(__file__).parents[1] / "docs" / "configuration.md"
    assert page.read_text(encoding="utf-8") == reference_markdown(), "run `make docs`"
