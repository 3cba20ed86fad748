"""Suites: read strictly, and scored as a loop over single sentences scores them."""

import csv
import gzip
import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from recurlm.config import Config, ModelConfig, apply_assignments
from recurlm.errors import DataError, RequestError, UserError
from recurlm.evaluation import suites
from recurlm.evaluation.suites import SUITES, LastWord, Pair, evaluate_suite, foresee, open_suite
from recurlm.model.neural import NeuralModel
from recurlm.text.tokenizers import TOKENIZERS, train_tokenizer
from support import SHARED, counts, record, small_text

PAIRS = [
    {"good": "the king drinks the tea .", "bad": "the tea drinks the king .", "group": "sense"},
    {"good": "sees", "bad": "river", "prefix": "the bird", "group": "form"},
    {"good": "the zebra sees it .", "bad": "the zebra stone it ."},
]
WORDS = [{"text": "the king sees a bird and the bird sees it", "group": "a"}, {"text": "Yes! The quagga", "group": "b"}]
GENERATED = [
    "pattern\tconstr_id\tsent_id\tcorrect_number\tform\tclass\ttype\tprefix\tfreq\tsent",
    'A\t0\t0\tsing\tsees\tcorrect\toriginal\tthe bird\t3\t"the bird "" sees "" it <eos>"',
    "A\t0\t0\tsing\tfinds\twrong\toriginal\tthe bird\t3\tthe bird finds it <eos>",
    "A\t0\t1\tplur\tstone\twrong\tgenerated\ta road\t3\ta road stone <eos>",
    "A\t0\t1\tplur\tleaves\tcorrect\tgenerated\ta road\t3\ta road leaves <eos>",
]
TEXT = ["the bird sees it <eos>", "a king Breaks the letter <eos>"]
GOLD = ["2\tsees\tsee\t0", "2\tbreaks\tbreak\t3"]


def blimp_line(number: int) -> str:
    good, bad = f"the king sees tea {number} .", f"the king tea sees {number} ."
    row = {"sentence_good": good, "sentence_bad": bad, "UID": f"u{number % 2}", "linguistics_term": "s-selection"}
    return json.dumps({**row, "pairID": str(number), "simple_LM_method": True})


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([small_text(300)], apply_assignments(Config(), ["tokenizer.kind=word"]).tokenizer)


@pytest.fixture(scope="module")
def model(tokenizer):
    config = ModelConfig(embedding_size=6, hidden_sizes=[6], init_range=0.9)
    return NeuralModel(config, tokenizer.vocab_size, torch.Generator().manual_seed(1)).double()


def write(path: Path, rows: list) -> Path:
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows), encoding="utf-8")
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A small file of each format, as `--from` takes it."""
    (tmp_path / "blimp").mkdir()
    write(tmp_path / "blimp" / "anaphor_gender_agreement.jsonl", [blimp_line(n) for n in range(6)])
    write(tmp_path / "lambada_test.jsonl", WORDS)
    write(tmp_path / "generated.tab", GENERATED)
    write(tmp_path / "subj_agr_filtered.text", TEXT)
    write(tmp_path / "subj_agr_filtered.gold", GOLD)
    write(tmp_path / "own.jsonl", PAIRS)
    return tmp_path


def nats(model, ids, start) -> float:
    """One sentence, one step at a time."""
    state, total = model.initial_state(1), 0.0
    for token in ids:
        log_probs, state = model.advance(torch.tensor([[start]]), state)
        total, start = total - log_probs[0, 0, token].item(), token
    return total


def test_each_format_is_read(folder):
    own = open_suite(str(folder / "own.jsonl"))[1]
    assert own[1] == Pair("sees", "river", "the bird", "form", "")
    assert open_suite("lambada", folder)[1][1] == LastWord("Yes! The", "quagga", "", "")
    blimp = open_suite("blimp", folder)[1]
    assert len(blimp) == 6 and {item.family for item in blimp} == {"argument_structure"}
    found = open_suite("gulordava", folder)[1]
    assert found[0] == Pair("sees", "finds", "the bird", "A", "original")
    assert found[1] == Pair("leaves", "stone", "a road", "A", "nonce")
    assert found[2:] == [
        Pair("sees", "see", "the bird", "0 attractors", "linzen"),
        Pair("breaks", "break", "a king", "3 attractors", "linzen"),
    ]


def test_gz_and_the_data_folder(folder, monkeypatch):
    path = folder / "own.jsonl"
    packed = folder / "packed.jsonl.gz"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    assert open_suite(str(packed))[1] == open_suite(str(path))[1]
    monkeypatch.setenv("RECURLM_DATA", str(folder))
    assert open_suite("blimp") == open_suite("blimp", folder) == open_suite("blimp", folder / "blimp")
    for name in SUITES:
        with pytest.raises(UserError, match="--from DIR"):
            open_suite(name, folder / "nothing")


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_pairs_equal_single_sentences(kind, folder):
    tokenizer = train_tokenizer([small_text(300)], apply_assignments(Config(), [f"tokenizer.kind={kind}"]).tokenizer)
    config = ModelConfig(embedding_size=6, hidden_sizes=[6], init_range=0.9)
    model = NeuralModel(config, tokenizer.vocab_size, torch.Generator().manual_seed(1)).double()
    items = open_suite(str(folder / "own.jsonl"))[1]
    found = evaluate_suite(model, tokenizer, items, "as-is")
    end, right = tokenizer.boundary_id, []
    for item in items:
        line = "{}" if item.prefix is None else item.prefix + " {}"
        tail = [end] if item.prefix is None else []
        good, bad = (
            nats(model, [*tokenizer.encode_prefix(line.format(w)).tolist(), *tail], end) for w in (item.good, item.bad)
        )
        right.append(good < bad)
    assert found["accuracy"] == pytest.approx(np.mean(right))
    assert {name: row["items"] for name, row in found["groups"].items()} == {"sense": 1, "form": 1}
    assert found["in_vocabulary"] == (2 if kind == "word" else 3)
    assert (found["oov_rate"] > 0) == (kind == "word")


def test_ties_are_wrong(model, tokenizer):
    found = evaluate_suite(model, tokenizer, [Pair("the zebra", "the quagga", None, "", "")])
    assert (found["accuracy"], found["ties"], found["in_vocabulary"], found["accuracy_in_vocabulary"]) == (
        0,
        1,
        0,
        None,
    )


def test_last_words_equal_single_steps(model, tokenizer):
    draw = random.Random(4)
    known = [
        tokenizer.token(i) for i in range(tokenizer.vocab_size) if i not in (tokenizer.unk_id, tokenizer.boundary_id)
    ]
    items = [
        LastWord(" ".join(draw.choices(known, k=draw.randint(1, 9))), draw.choice(known), "", "") for _ in range(60)
    ]
    items.append(LastWord("the king", "quagga", "", ""))
    found = evaluate_suite(model, tokenizer, items, "as-is")
    right, total = 0, 0.0
    for item in items[:-1]:
        state, ids = model.initial_state(1), [tokenizer.boundary_id, *tokenizer.encode_prefix(item.context).tolist()]
        log_probs, _ = model.advance(torch.tensor(ids)[:, None], state)
        target = tokenizer.encode_prefix(item.target)[0]
        right += int(log_probs[-1, 0].argmax()) == target
        total -= log_probs[-1, 0, target].item()
    assert right > 0
    assert found["accuracy"] == pytest.approx(right / 61)
    assert found["accuracy_in_vocabulary"] == pytest.approx(right / 60)
    assert found["target_ppl"] == pytest.approx(np.exp(total / 60), rel=1e-9)


def test_the_last_sentence_alone(model, tokenizer):
    whole = evaluate_suite(model, tokenizer, [LastWord("the bird . the king", "sees", "", "")], "as-is")
    alone = evaluate_suite(model, tokenizer, [LastWord("the king", "sees", "", "")], "as-is")
    assert whole["target_ppl_last_sentence"] == pytest.approx(alone["target_ppl"], rel=1e-9)
    assert whole["target_ppl"] != pytest.approx(alone["target_ppl"], rel=1e-6)


def test_targets_of_several_tokens_and_long_contexts(model, tokenizer, monkeypatch):
    asked = [([1, 2, 3] * 40, [4, 5]), ([], [3]), ([2], []), ([5, 6] * 60, [1, 2])]
    found = foresee(model, asked, 0)
    for (context, target), (value, _) in zip(asked, found, strict=True):
        expected = nats(model, [*context, *target], 0) - nats(model, context, 0)
        assert value == pytest.approx(expected, abs=1e-9)
    monkeypatch.setattr(suites, "ROW_TOKENS", 16)
    assert [v for v, _ in foresee(model, asked, 0)] == pytest.approx([v for v, _ in found])


def test_a_backward_model_takes_pairs_only(tokenizer):
    config = ModelConfig(embedding_size=6, hidden_sizes=[6], backward=True, init_range=0.9)
    model = NeuralModel(config, tokenizer.vocab_size, torch.Generator().manual_seed(1)).double()
    pair = Pair("the king sees it", "the king it sees", None, "", "")
    ids = [tokenizer.encode_prefix(text).tolist()[::-1] for text in (pair.good, pair.bad)]
    end = tokenizer.boundary_id
    good, bad = (nats(model, [*i, end], end) for i in ids)
    assert evaluate_suite(model, tokenizer, [pair])["accuracy"] == float(good < bad)
    with pytest.raises(RequestError, match="backward"):
        evaluate_suite(model, tokenizer, [LastWord("the", "king", "", "")])


WRONG: list[tuple[str, str, str]] = [
    ("own.jsonl", "{", "not strict JSON"),
    ("own.jsonl", "[1]", "JSON object"),
    ("own.jsonl", '{"good": "a", "good": "b", "bad": "c"}', "twice"),
    ("own.jsonl", '{"good": "a"}', '"bad"'),
    ("own.jsonl", '{"good": "a", "bad": " "}', '"bad"'),
    ("own.jsonl", '{"good": "a", "bad": "b", "grop": "c"}', "Did you mean 'group'"),
    ("own.jsonl", '{"good": "a b", "bad": "a  b"}', "are the same"),
    ("own.jsonl", '{"good": "a", "bad": "\\ud800"}', "surrogate"),
    ("own.jsonl", '{"text": "two words"}', "make two"),
    ("lambada_test.jsonl", '{"text": "one"}', "two words"),
    ("blimp/anaphor_gender_agreement.jsonl", '{"sentence_good": "a b"}', '"sentence_bad"'),
    ("generated.tab", "A\t0", "2 columns"),
    ("generated.tab", 'A\t0\t0\tsing\t"sees', "tab-separated"),
    ("generated.tab", GENERATED[1], "is missing"),
    ("subj_agr_filtered.gold", "x\ty\tz\t0", "expected place"),
    ("subj_agr_filtered.gold", "0\tsees\tsee\t0", "has no 'sees'"),
    ("subj_agr_filtered.text", "one more line", "has only 2 lines"),
]


def suite_of(folder: Path, name: str) -> tuple[str, Path | str]:
    kind = {"own.jsonl": str(folder / "own.jsonl"), "lambada_test.jsonl": "lambada"}.get(name)
    return kind or ("blimp" if name.startswith("blimp") else "gulordava"), folder


@pytest.mark.parametrize(("name", "line", "words"), WRONG)
def test_a_wrong_line_is_named(name, line, words, folder):
    path = folder / name
    number = len(path.read_text().splitlines()) + 1
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(DataError, match=words) as caught:
        open_suite(*suite_of(folder, name))
    assert f"line {number}:" in str(caught.value)


def naive(folder: Path, name: str) -> list:
    """The items as a few lines without any check read them."""
    lines = (folder / name).read_bytes().decode().removeprefix("\ufeff").split("\n")
    lines = [line.removesuffix("\r") for line in lines]
    if name.endswith(".jsonl"):
        rows = [json.loads(line) for line in lines if line.strip()]
        if name.startswith("blimp"):
            return [(r["sentence_good"], r["sentence_bad"], None) for r in rows]
        if name.startswith("lambada") or (rows and "text" in rows[0]):
            return [tuple(r["text"].rstrip().rsplit(None, 1)) for r in rows]
        return [(r["good"], r["bad"], r.get("prefix")) for r in rows]
    if name.endswith(".tab"):
        head, *rows = [next(csv.reader([line], delimiter="\t")) for line in lines if line]
        form, kind, prefix = (head.index(column) for column in ("form", "class", "prefix"))
        pairs = [sorted(rows[i : i + 2], key=lambda row: row[kind]) for i in range(0, len(rows), 2)]
        return [(good[form], bad[form], good[prefix]) for good, bad in pairs]
    text = (folder / "subj_agr_filtered.text").read_bytes().decode().removeprefix("\ufeff").split("\n")
    gold = (folder / "subj_agr_filtered.gold").read_bytes().decode().removeprefix("\ufeff").split("\n")
    cells = [(line.split("\t"), sentence.split()) for line, sentence in zip(gold, text, strict=False) if line]
    return [(c[1].lower(), c[2].lower(), " ".join(words[: int(c[0])])) for c, words in cells]


@pytest.mark.chaos
def test_mutants_are_refused_with_the_line_or_read_right(folder):
    """Bits flipped, lines cut, lost, doubled and swapped, junk put in: an error with a line number, or what the file says."""
    draw, number = random.Random(5), counts(400, 10_000)
    names = ["own.jsonl", "lambada_test.jsonl", "blimp/anaphor_gender_agreement.jsonl", "generated.tab",
             "subj_agr_filtered.text", "subj_agr_filtered.gold"]  # fmt: skip
    originals = {name: (folder / name).read_bytes() for name in names}
    whole = {name: len(open_suite(*suite_of(folder, name))[1]) for name in names}
    junk = [
        b"\xff",
        b'"',
        b"\t",
        b"\n",
        b"{",
        b"}",
        b"\\",
        b"\\ud800",
        b"\0",
        b"9" * 40,
        b"[" * 5000,
        b"\r",
        b"\xef\xbb\xbf",
    ]
    refused = accepted = empty = 0
    for turn in range(number):
        name = names[turn % len(names)]
        data = bytearray(originals[name])
        for _ in range(draw.choice([1, 1, 1, 2, 4])):
            at, choice = draw.randrange(len(data)), draw.randrange(6)
            if choice == 0:
                data[at] ^= 1 << draw.randrange(8)
            elif choice == 1:
                data = data[: at + 1]
            elif choice == 2:
                del data[at]
                data = data or bytearray(b"x")
            elif choice == 3:
                data[at:at] = draw.choice(junk)
            else:
                lines = data.split(b"\n")
                i, j = draw.randrange(len(lines)), draw.randrange(len(lines))
                lines[i] = lines[j] if choice == 4 else lines[i] + lines[j]
                data = bytearray(b"\n".join(lines)) or bytearray(b"x")
        (folder / name).write_bytes(data)
        try:
            items = open_suite(*suite_of(folder, name))[1]
        except DataError as error:
            message = str(error)
            empty += "no items" in message
            assert "line " in message or "no items" in message, message
            assert len(message) < 900
            refused += 1
        else:
            accepted += 1
            assert len(items) <= 2 * whole[name] + 4
            read = [(i.good, i.bad, i.prefix) if isinstance(i, Pair) else (i.context, i.target) for i in items]
            if name.startswith("generated"):
                read = read[: -len(GOLD)]
            assert (read[-len(GOLD) :] if name.startswith("subj") else read) == naive(folder, name)
        finally:
            (folder / name).write_bytes(originals[name])
    assert refused > number // 5 and accepted > number // 20
    record("malformed_suites", mutants=number, refused=refused, read_right=accepted, without_items=empty)


def test_real_suites_are_read_whole(monkeypatch):
    if not (SHARED / "suites").is_dir():
        pytest.skip("the suites are not here")
    monkeypatch.setenv("RECURLM_DATA", str(SHARED))
    found = {name: open_suite(name)[1] for name in SUITES}
    assert {name: len(items) for name, items in found.items()} == {
        "blimp": 67_000,
        "lambada": 5153,
        "gulordava": 41 + 369 + 7489,
    }
    families = {item.family for item in found["blimp"]}
    assert families == SUITES["blimp"].published.keys() - {""} and len({item.group for item in found["blimp"]}) == 67
