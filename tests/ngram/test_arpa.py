"""ARPA files: what is written is read back, and what cannot be right is refused with its line."""

import gzip
import re

import numpy as np
import pytest
import torch
from toys import BOUNDARY, FALLBACK, GOLDEN

from recurlm.config import TokenizerConfig
from recurlm.errors import DataError, RequestError, UserError
from recurlm.ngram import arpa
from recurlm.ngram.counts import count
from recurlm.ngram.model import NgramModel, _distribution
from recurlm.ngram.smoothing import SMOOTHINGS, Settings, estimate
from recurlm.ngram.trie import Table
from recurlm.text.tokenizers import TOKENIZERS, train_tokenizer
from support import counts as how_many
from support import record, small_text

SMALL = """\\data\\
ngram 1=5
ngram 2=3

\\1-grams:
-1\t<unk>\t0
0\t<s>\t-0.0791812
-0.52287874\t</s>\t0
-0.39794\ta\t-0.6197888
-0.69897\tb\t0

\\2-grams:
-0.30103\t<s> a
-0.30103\ta </s>
-0.4202164\ta b

\\end\\
"""


def total(table: Table, contexts: int = 40) -> float:
    """The largest distance from one of the sum of all probabilities, <unk>'s own share among them, after some contexts."""
    model = NgramModel(table)
    inner = np.unique(np.linspace(0, max(0, table.trie.inner - 1), contexts).astype(int)) if table.trie.inner else [-1]
    worst = 0.0
    for node in inner:
        # From a context, not to it: the distribution that the model has there.
        out_V = torch.empty(table.trie.vocab_size, dtype=torch.double).numpy()
        _distribution(table.walk, np.int64(node), out_V)
        left = 0.0
        if table.known_V.all():  # nothing stands for <unk>, whose share is lost
            weight, c = 0.0, int(node)
            while c >= 0:
                weight, c = weight + float(table.backoff_I[c]), int(table.trie.links_K[c])
            left = 10 ** (table.unk_log10 + weight)
        worst = max(worst, abs(float(np.exp(out_V).sum()) + left - 1))
    assert model.order == table.trie.order
    return worst


def equal(a: Table, b: Table) -> bool:
    arrays = zip(a.walk, b.walk, strict=True)
    return (
        a.trie.levels == b.trie.levels and all(np.array_equal(x, y) for x, y in arrays) and a.unk_log10 == b.unk_log10
    )


@pytest.mark.parametrize("name", sorted(path.name for path in GOLDEN.glob("*.arpa")))
@pytest.mark.parametrize("ending", ["", ".gz"])
def test_golden_files_come_back(name, ending, tmp_path):
    table, tokenizer = arpa.read(GOLDEN / name, normalised="nointerp" not in name)
    arpa.write(tmp_path / f"again.arpa{ending}", table, tokenizer)
    again, words = arpa.read(tmp_path / f"again.arpa{ending}", normalised="nointerp" not in name)
    assert equal(table, again) and words.hash == tokenizer.hash
    if "nointerp" not in name:  # there, what is impossible is written -100
        text = (tmp_path / f"again.arpa{ending}").read_bytes()
        text = gzip.decompress(text) if ending else text
        assert sorted(text.split(b"\n")) == sorted((GOLDEN / name).read_bytes().split(b"\n"))


@pytest.mark.parametrize("smoothing", SMOOTHINGS)
@pytest.mark.parametrize("order", [1, 3])
def test_models_of_every_smoothing_come_back(smoothing, order, tmp_path):
    text = small_text(60) + "a rare <unk> word\n\n"
    tokenizer = train_tokenizer([text], TokenizerConfig(kind="word"))
    ids = tokenizer.encode(text)
    counts = count(ids, tokenizer.vocab_size, tokenizer.boundary_id, order)
    table, facts = estimate(counts, ids, ids, Settings(smoothing=smoothing, fallback=FALLBACK))
    arpa.write(tmp_path / "a.arpa", table, tokenizer)
    back, words = arpa.read(tmp_path / "a.arpa", normalised=facts.get("normalised", True))
    assert set(words.pieces) == set(tokenizer.pieces)
    line = "the tea drinks a rare song <unk> of \n"
    theirs = [NgramModel(t).trace(w.encode(line), w.boundary_id)[1] for t, w in ((table, tokenizer), (back, words))]
    assert theirs[0] == pytest.approx(theirs[1], abs=1e-6)


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_ids_of_every_tokenizer_can_be_written(kind, tmp_path):
    tokenizer = train_tokenizer([small_text(30)], TokenizerConfig(kind=kind))
    ids = tokenizer.encode(small_text(30))
    counts = count(ids, tokenizer.vocab_size, tokenizer.boundary_id, 3)
    table, _ = estimate(counts, ids, None, Settings(fallback=FALLBACK))
    arpa.write(tmp_path / "a.arpa", table, tokenizer)
    assert arpa.read(tmp_path / "a.arpa")[0].trie.order == 3


def test_words_with_a_meaning_of_their_own_are_not_written(tmp_path):
    text = "a <s> b\n"
    tokenizer = train_tokenizer([text], TokenizerConfig(kind="word"))
    ids = tokenizer.encode(text)
    table, _ = estimate(count(ids, tokenizer.vocab_size, BOUNDARY, 2), ids, None, Settings(fallback=FALLBACK))
    with pytest.raises(RequestError, match="'<s>'"):
        arpa.write(tmp_path / "a.arpa", table, tokenizer)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("find", "put", "line", "says"),
    [
        ("\\data\\\n", "hello\n", 1, r"expected \\data\\"),
        ("ngram 2=3", "ngram 3=3", 3, "expected 'ngram 2='"),
        ("ngram 2=3", "ngram 2=x", 3, "expected 'ngram 2='"),
        ("ngram 2=3", "ngram 2=4", 16, "3 2-grams end here, but the header has 4"),
        ("ngram 2=3", "ngram 2=2", 15, "more 2-grams than the 2 of the header"),
        ("\\1-grams:", "\\one-grams:", 5, r"expected \\1-grams:"),
        ("-0.69897\tb", "zero\tb", 10, "expected a base-10 logarithm"),
        ("-0.69897\tb", "nan\tb", 10, "expected a base-10 logarithm"),
        ("-0.69897\tb", "-1e99\tb", 10, "expected a base-10 logarithm"),
        ("-0.69897\tb", "0.5\tb", 10, "no probability is above one"),
        ("-0.69897\tb", "-0.5\tb", 5, "1-grams sum to 1.1"),
        ("-0.69897\tb", "-0.69897\ta", 10, "'a' is listed twice"),
        ("-0.69897\tb", "-0.69897\t<eos>", 10, "stands for a line's end"),
        ("-0.69897\tb", "-0.69897\tb\u00a0c", 10, "holds white space"),
        ("0\t<s>\t-0.0791812\n", "-9\tx\t-0.3\n", 11, "without <s>"),
        ("a b\n", "a c\n", 15, "'c' is not among the 1-grams"),
        ("a b\n", "a a b\n", 15, "expected 2 words"),
        ("a b\n", "a  b\n", 15, "expected 2 words"),
        ("a b\n", "a b\t0\t0\n", 15, "expected log10 p"),
        ("a b\n", "a <s>\n", 15, "only be the first word"),
        ("<s> a\n", "</s> a\n", 13, "only be the first word"),
        ("a b\n", "a </s>\n", 15, "listed twice"),
        ("\ta\t-0.6197888", "\ta\t-0.2", 9, "sum to 1"),
        ("\tb\t0\n", "\tb\t-0.5\n", 10, "sum to 0.316228"),
        ("\\end\\\n", "", 17, "cut short"),
        ("a b\n\n\\end\\\n", "a", 15, "cut short"),
        ("\\end\\", "\\e\\", 17, r"expected \\end\\"),
    ],
)
def test_faults_are_named_with_their_line(find, put, line, says, tmp_path):
    assert SMALL.count(find) == 1
    path = tmp_path / "a.arpa"
    path.write_text(SMALL)
    assert total(arpa.read(path)[0]) < 1e-6
    path.write_text(SMALL.replace(find, put))
    with pytest.raises(DataError, match=says) as caught:
        arpa.read(path)
    found = re.search(r"line (\d+): ", str(caught.value))
    assert found and abs(int(found[1]) - line) <= (2 if "1-grams sum" in says else 0), str(caught.value)


def test_an_n_gram_without_its_begin_is_refused(tmp_path):
    text = (GOLDEN / "o3.arpa").read_text()
    text = re.sub(r"\n[^\n]*\tthe cat\t[^\n]*", "", text, count=1).replace("ngram 2=395", "ngram 2=394")
    (tmp_path / "a.arpa").write_text(text)
    with pytest.raises(DataError, match=r"line \d+: the first 2 words of this n-gram are no n-gram"):
        arpa.read(tmp_path / "a.arpa")


def test_sums_are_not_asked_for_where_they_are_not_wanted(tmp_path):
    (tmp_path / "a.arpa").write_text(SMALL.replace("-0.69897\tb", "-0.5\tb"))
    assert arpa.read(tmp_path / "a.arpa", normalised=False)[0].trie.levels == (0, 4, 7)


def test_spaces_and_end_of_lines_as_others_write_them(tmp_path):
    (tmp_path / "a.arpa").write_bytes(SMALL.replace("\t", " ").replace("\n", "\r\n").encode())
    (tmp_path / "b.arpa").write_text("\n" + SMALL)
    assert equal(arpa.read(tmp_path / "a.arpa")[0], arpa.read(tmp_path / "b.arpa")[0])


def test_an_unknown_word_with_n_grams_of_its_own(tmp_path):
    (tmp_path / "a.arpa").write_text(
        SMALL.replace("a b\n", "a <unk>\n").replace("-0.30103\n-0.69", "-0.4771213\n-0.69")
    )
    table, tokenizer = arpa.read(tmp_path / "a.arpa", normalised=False)
    assert table.known_V[tokenizer.unk_id] and table.unk_log10 == arpa.LOG10_ZERO
    arpa.write(tmp_path / "b.arpa", table, tokenizer)
    assert "a <_unk_>" in (tmp_path / "b.arpa").read_text()


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        arpa.read(tmp_path / "none.arpa")
    with pytest.raises(UserError, match="cannot be read"):
        arpa.read(tmp_path)
    (tmp_path / "a.arpa.gz").write_bytes(gzip.compress(SMALL.encode())[:40])
    with pytest.raises(DataError, match="gzip"):
        arpa.read(tmp_path / "a.arpa.gz")
    (tmp_path / "b.arpa").write_bytes(SMALL.encode().replace(b"\tb\t", b"\t\xff\t"))
    with pytest.raises(DataError, match="line 10: not UTF-8"):
        arpa.read(tmp_path / "b.arpa")


def mutant(text: bytes, rng: np.random.Generator) -> bytes:
    """The file with a byte changed, a stretch lost or doubled, lines exchanged or dropped, a number changed, or cut short."""
    at, size = int(rng.integers(len(text))), int(rng.integers(1, 40))
    lines = text.split(b"\n")
    a, b = sorted(int(n) for n in rng.integers(len(lines), size=2))
    numbers = [m.span() for m in re.finditer(rb"-?\d+\.\d+", text)]
    match int(rng.integers(9)):
        case 0:
            return text[:at] + bytes([rng.integers(256)]) + text[at + 1 :]
        case 1:
            return text[:at] + text[at + size :]
        case 2:
            return text[:at] + text[at : at + size] + text[at:]
        case 3:
            lines[a], lines[b] = lines[b], lines[a]
        case 4:
            del lines[a]
        case 5:
            lines.insert(b, lines[a])
        case 6:
            return text[:at]
        case 7:
            start, end = numbers[rng.integers(len(numbers))]
            new = [b"%.6f" % rng.normal(0, 3), b"nan", b"-inf", b"1e400", b"-0", b"", b"0x1p3", b"--1"][rng.integers(8)]
            return text[:start] + new + text[end:]
        case 8:
            lines[a] = lines[a][: rng.integers(len(lines[a]) + 1)] + lines[b]
    return b"\n".join(lines)


@pytest.mark.chaos
@pytest.mark.parametrize("name", ["o2", "o3", "o3_prune012", "toy20_o3_fallback"])
def test_mutants_are_refused_with_a_line_or_sum_to_one(name, tmp_path):
    text, rng = (GOLDEN / f"{name}.arpa").read_bytes(), np.random.default_rng(len(name))
    path, refused, sound = tmp_path / "mutant.arpa", 0, 0
    for _ in range(how_many(150, 1000)):
        path.write_bytes(mutant(text, rng))
        try:
            table, _ = arpa.read(path)
        except DataError as error:
            assert re.search(r"mutant\.arpa, line \d+: [^\n]+\.$", str(error)), str(error)
            refused += 1
        else:
            assert total(table) < 5e-3
            sound += 1
    record(f"arpa mutants of {name}", refused=refused, sound=sound)
    assert refused > sound > 0
