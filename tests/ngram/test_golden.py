"""Against models that KenLM's lmplz made of the same texts: every probability, every weight, every score."""

import gzip
import math
import re
from pathlib import Path

import numpy as np
import pytest
from toys import GOLDEN

from recurlm.config import TokenizerConfig
from recurlm.ngram import arpa, run
from recurlm.ngram.counts import count
from recurlm.ngram.model import NgramModel
from recurlm.ngram.query import explain
from recurlm.ngram.smoothing import Settings, estimate
from recurlm.ngram.trie import LOG10_ZERO, Table
from recurlm.text.tokenizers import Tokenizer, train_tokenizer
from support import SHARED

WORDS = TokenizerConfig(kind="word")
VARIANTS = {
    "o1": ("toy", 1, Settings()),
    "o2": ("toy", 2, Settings()),
    "o3": ("toy", 3, Settings()),
    "o4": ("toy", 4, Settings()),
    "o3_prune012": ("toy", 3, Settings(cutoffs=(0, 1, 2))),
    "o3_nointerp_uni": ("toy", 3, Settings(interpolate_unigrams=False)),
    "toy20_o3_fallback": ("toy20", 3, Settings(fallback=(0.4, 0.9, 1.3))),
}


def entries(path: Path) -> dict[str, tuple[float, float | None]]:
    """(log10 p, log10 weight) of each n-gram of an ARPA file."""
    out = {}
    text = gzip.decompress(path.read_bytes()).decode() if path.suffix == ".gz" else path.read_text()
    for line in text.split("\n"):
        if "\t" in line:
            p, words, *weight = line.split("\t")
            out[words] = max(float(p), LOG10_ZERO), float(weight[0]) if weight else None
    return out


def made(text: Path, order: int, settings: Settings) -> tuple[Table, Tokenizer, np.ndarray, dict]:
    tokenizer = train_tokenizer([text.read_text()], WORDS)
    ids = tokenizer.encode(text.read_text())
    counts = count(ids, tokenizer.vocab_size, tokenizer.boundary_id, order)
    table, facts = estimate(counts, ids, None, settings)
    return table, tokenizer, ids, facts


def compare(table: Table, tokenizer: Tokenizer, golden: Path, scratch: Path) -> None:
    arpa.write(scratch / "ours.arpa", table, tokenizer)
    ours, theirs = entries(scratch / "ours.arpa"), entries(golden)
    assert ours.keys() == theirs.keys()
    both = np.array([[(a, 0 if b is None else b) for a, b in (ours[words], theirs[words])] for words in theirs])
    assert np.abs(both[:, 0] - both[:, 1]).max() < 1e-5
    assert all((ours[words][1] is None) == (weight is None) for words, (_, weight) in theirs.items())


@pytest.mark.parametrize("name", VARIANTS)
def test_every_number_of_the_golden_models(name, tmp_path):
    text, order, settings = VARIANTS[name]
    table, tokenizer, _, facts = made(GOLDEN / f"{text}.txt", order, settings)
    compare(table, tokenizer, GOLDEN / f"{name}.arpa", tmp_path)
    expected = re.findall(r"^\d.*D1=(\S+) D2=(\S+) D3\+=(\S+)", (GOLDEN / f"{name}.discounts.txt").read_text(), re.M)
    assert np.array(facts["discounts"]) == pytest.approx(np.array(expected, float), rel=1e-5)


@pytest.mark.parametrize("name", [name for name in VARIANTS if (GOLDEN / f"{name}.test.query.txt").exists()])
def test_every_word_of_the_golden_queries(name):
    text, order, settings = VARIANTS[name]
    table, tokenizer, _, _ = made(GOLDEN / f"{text}.txt", order, settings)
    model, seen = NgramModel(table), 0
    answers = [line for line in (GOLDEN / f"{name}.test.query.txt").read_text().split("\n") if "Total:" in line]
    for line, answer in zip((GOLDEN / "toy.test.txt").read_text().splitlines(), answers, strict=True):
        rows = re.findall(r"\S+=(\d+) (\d+) (-\S+)", answer)
        for (id, length, log10), found in zip(rows, explain(model, tokenizer, line), strict=True):
            assert found.log10 == pytest.approx(float(log10), abs=1e-5)
            assert found.length == (int(length) if id != "0" else 0)
            seen += 1
    assert seen == 252  # 222 words and 30 line ends


def ptb(name: str) -> Path:
    path = SHARED / name
    if not path.exists():
        pytest.skip(f"{path} is not there")
    return path


@pytest.fixture(scope="module")
def penn():
    """(ids of train, valid and test; tokenizer; counts of order 5)."""
    tokenizer = train_tokenizer([ptb("ptb/train.txt").read_text()], WORDS)
    ids = [tokenizer.encode(ptb(f"ptb/{split}.txt").read_text()) for split in ("train", "valid", "test")]
    return *ids, tokenizer, count(ids[0], tokenizer.vocab_size, tokenizer.boundary_id, 5)


def test_penn_treebank_of_order_3(penn, tmp_path):
    train, _, test, tokenizer, _ = penn
    counts = count(train, tokenizer.vocab_size, tokenizer.boundary_id, 3)
    table, _ = estimate(counts, train, None, Settings())
    assert math.exp(run.mean_loss(NgramModel(table), test, tokenizer.boundary_id)) == pytest.approx(148.281, abs=6e-4)
    compare(table, tokenizer, ptb("kenlm/ptb.o3.arpa.gz"), tmp_path)


def test_penn_treebank_of_order_5(penn):
    train, valid, test, tokenizer, counts = penn
    table, _ = estimate(counts, train, None, Settings())
    model, boundary = NgramModel(table), tokenizer.boundary_id
    assert math.exp(run.mean_loss(model, test, boundary)) == pytest.approx(141.186, abs=6e-4)
    assert math.exp(run.mean_loss(model, valid, boundary)) == pytest.approx(148.007, abs=6e-4)
    rows = ptb("kenlm/ptb.o5.test.sentence_scores.tsv").read_text().splitlines()[1:]
    lines = np.split(test, np.flatnonzero(test == boundary)[:-1] + 1)
    for row, line in zip(rows, lines, strict=True):
        assert model.trace(line, boundary)[0] == pytest.approx(float(row.split("\t")[3]), abs=1e-4)


@pytest.mark.parametrize(
    ("settings", "ppl"),
    [
        (Settings(cutoffs=(0, 0, 1)), 147.40),
        (Settings(cutoffs=(0, 1, 1)), 158.50),
        (Settings(cutoffs=(0, 0, 1, 1, 2)), 148.05),
        (Settings(interpolate_unigrams=False), 142.89),
    ],
    ids=str,
)
def test_variants_of_penn_treebank(penn, settings, ppl):
    train, _, test, tokenizer, counts = penn
    table, _ = estimate(counts, train, None, settings)
    assert math.exp(run.mean_loss(NgramModel(table), test, tokenizer.boundary_id)) == pytest.approx(ppl, abs=6e-3)


@pytest.mark.parametrize(("order", "ppl"), [(3, 226.051), (5, 220.139)])
def test_wikitext_2(order, ppl):
    table, tokenizer, _, _ = made(ptb("wikitext-2/train.txt"), order, Settings())
    test = tokenizer.encode(ptb("wikitext-2/test.txt").read_text())
    assert math.exp(run.mean_loss(NgramModel(table), test, tokenizer.boundary_id)) == pytest.approx(ppl, abs=6e-4)
