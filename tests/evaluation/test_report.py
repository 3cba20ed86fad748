"""The reading of a text equals `evaluate`, whatever the tokenizer and direction; probes equal slow oracles; the page is whole."""

import json
import math
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import torch

from recurlm import api
from recurlm.config import Config, ModelConfig, apply_assignments
from recurlm.errors import UserError
from recurlm.evaluation import probes
from recurlm.evaluation.page import Chart, Series, Table, coloured, shown, svg, table
from recurlm.evaluation.reading import Reader, Subject, Text
from recurlm.evaluation.report import report
from recurlm.language_model import LanguageModel
from recurlm.model.neural import NeuralModel
from recurlm.protocol import StatefulModel
from recurlm.text.batches import BATCHING
from recurlm.text.tokenizers import TOKENIZERS, train_tokenizer
from support import small_text, tiny_config

ODD = "One  tab\there,\u3000wide space; na\u00efve \u00bd \U0001f600!\n\n indented line \nlast without end"


def subject(kind: str, *, batching: str = "stream", backward: bool = False, extra: str = "") -> Subject:
    settings = [f"tokenizer.kind={kind}", *([extra] if extra else [])]
    tokenizer = train_tokenizer([small_text(200), ODD], apply_assignments(Config(), settings).tokenizer)
    config = ModelConfig(embedding_size=6, hidden_sizes=[6], init_range=0.9, backward=backward)
    model = NeuralModel(config, tokenizer.vocab_size, torch.Generator().manual_seed(1)).double()
    return Subject(kind, model, tokenizer, batching)


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("text", [ODD, small_text(40), "\n\n\n", "a"], ids=["odd", "small", "empty lines", "a"])
def test_words_are_the_texts_own(kind, text):
    """Every tokenizer's tokens fall on the same words: those of str.split, and the line ends."""
    tokenizer, words = subject(kind).tokenizer, Text(text)
    assert [w for w in words.words if w != "\n"] == text.split()
    assert int(words.line_ends.sum()) == text.rstrip("\n").count("\n") + (len(text) - len(text.rstrip("\n")) or 1)
    ids = tokenizer.encode(words.text)
    places = words.words_of_tokens(tokenizer, ids)
    assert (np.diff(places) >= 0).all() and len(places) == len(ids)
    for n, word in enumerate(words.words):
        spelled = tokenizer.decode(ids[places == n])
        assert spelled.strip() == word.strip() or kind == "word"


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("batching", BATCHING)
@pytest.mark.parametrize("kind", TOKENIZERS)
def test_a_reading_adds_up_to_evaluate(kind, batching, backward):
    who = subject(kind, batching=batching, backward=backward)
    text = small_text(60) + "\n" + small_text(20, seed=4)
    reading = Reader(who, Text(text)).read(1)
    model = LanguageModel(who.model, who.tokenizer, {"batching": batching})
    expected, found = model.evaluate_text(text), reading.summary(Text(text))
    for key in ("ppl", "ppl_word", "bpc", "bpb", "top1", "top5", "top10", "mrr"):
        assert found[key] == pytest.approx(expected[key], rel=1e-9), key
    assert reading.sampled_W.all() and (kind == "word") == bool(reading.keys)


def test_a_sample_of_predictions_changes_no_loss(monkeypatch):
    reader = Reader(subject("word"), Text(small_text(300)))
    whole = reader.read(4)
    monkeypatch.setattr("recurlm.evaluation.reading.PREDICTIONS", 400 * reader.subject.model.vocab_size)
    monkeypatch.setattr("recurlm.evaluation.reading._CHUNK", 80 * reader.subject.model.vocab_size)
    some = reader.read(4)
    assert np.allclose(some.bits_W, whole.bits_W, rtol=1e-10)
    assert 200 < len(some.rank_S) < 800 and some.sampled_W.sum() == len(some.rank_S)
    assert np.allclose(some.entropy_W[some.sampled_W], whole.entropy_W[some.sampled_W])


def test_context_is_what_it_says():
    """Bits with n words of context, one target at a time."""
    reader = Reader(subject("word"), Text(small_text(200)))
    model, start = reader.subject.model, reader.subject.tokenizer.boundary_id
    places = np.linspace(probes.LENGTHS[-1], len(reader.text.words) - probes.TARGETS, probes.CHUNKS).astype(int)
    for n in (1, 5):
        total = 0.0
        for place in places:
            for word in range(place, place + probes.TARGETS):
                ids = [start, *reader.ids_N[word - n : word].tolist()]
                log_probs, _ = model.advance(torch.tensor(ids)[:, None], model.initial_state(1))
                total -= log_probs[-1, 0, int(reader.ids_N[word])].item() / math.log(2)
        found = probes.context_lengths(reader)[n]
        assert found == pytest.approx(total / (probes.CHUNKS * probes.TARGETS), rel=1e-5)


def test_documents_begin_at_titles_or_after_empty_lines():
    titled = Text("\n = A = \n\n b c .\n\n = = D = = \n\n e\n = F g = \n h\n")
    assert [titled.words[n + 1] for n in titled.document_starts] == ["A", "F"]
    parted = Text("a b\nc\n\n\nd e\n\nf = g\n")
    assert [parted.words[n] for n in parted.document_starts] == ["d", "f"]
    assert Text("a\nb\n").document_starts.tolist() == [] == Text("= a =\nb\n").document_starts.tolist()


def test_a_border_of_documents_costs_what_the_state_before_it_does():
    lines = small_text(600, seed=1).splitlines(keepends=True)
    text = "".join(f"= {line.strip()} =\n" if n % 40 == 0 else line for n, line in enumerate(lines))
    reader = Reader(subject("word"), Text(text))
    found = probes.at_borders(reader)
    starts = [n for n in reader.text.document_starts if n >= probes.WHOLE and n + probes.AFTER <= len(reader.ids_N)]
    model, boundary = reader.subject.model, reader.subject.tokenizer.boundary_id
    for kind, before in (("the document before", probes.WHOLE), ("nothing", 0)):
        total = np.zeros(probes.AFTER)
        for place in starts:
            ids = torch.from_numpy(np.append([boundary], reader.ids_N[place - before : place + probes.AFTER]))
            nll, _ = model.score(ids[:-1, None], ids[1:, None], model.initial_state(1))
            total += nll[before:, 0].detach().double().numpy() / math.log(2)
        assert found[kind] == pytest.approx(total / len(starts), rel=1e-5)
    assert probes.at_borders(Reader(subject("word"), Text(small_text(600)))) == {}


class LastSeen(StatefulModel):
    """Half on the last id, the rest over all: it copies nothing but the word before, and needs one word of context."""

    def __init__(self, vocab_size: int):
        self.vocab_size = vocab_size

    def initial_state(self, batch):
        return torch.zeros(batch)

    def advance(self, ids_TB, state):
        probs = torch.full((*ids_TB.shape, self.vocab_size), 0.5 / self.vocab_size)
        return probs.scatter_add(-1, ids_TB[..., None], torch.full((*ids_TB.shape, 1), 0.5)).log(), state

    def score(self, ids_TB, targets_TB, state):
        log_probs, state = self.advance(ids_TB, state)
        return -log_probs.gather(-1, targets_TB[..., None]).squeeze(-1), state


def test_any_stateful_model_can_be_reported_on():
    """And one that looks one word back shows exactly that."""
    tokenizer = subject("word").tokenizer
    text = small_text(200)
    html, numbers = report([Subject("last & seen", LastSeen(tokenizer.vocab_size), tokenizer)], text, "a <text>")
    sections = numbers["sections"]
    dropped = [row[1] for row in sections["context"][0]["rows"]]
    assert dropped == pytest.approx([dropped[0]] * len(dropped), rel=1e-6)
    shuffled = [row[2] for row in sections["context"][0]["rows"] if row[2] is not None]
    assert shuffled == pytest.approx([dropped[0]] * 4, rel=1e-6)
    own, other, nothing = (row[1:] for row in sections["switch"][0]["rows"])
    assert own == pytest.approx(other, rel=1e-6) and own == pytest.approx(nothing, rel=1e-6)
    assert sections["repetition"][0]["rows"][2][0] == "most probable" and sections["repetition"][0]["rows"][2][1] > 0.9
    assert "last &amp; seen" in html and "a &lt;text&gt;" in html


class Checker(HTMLParser):
    """Opens and closes tags, gathers ids and references."""

    def __init__(self):
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []

    def handle_starttag(self, tag, attrs):
        if tag not in ("meta", "br", "link"):
            self.open.append(tag)
        self.ids += [value for name, value in attrs if name == "id"]
        self.links += [v for name, v in attrs if name in ("href", "src", "xlink:href") and v]

    def handle_startendtag(self, tag, attrs):
        self.links += [v for name, v in attrs if name in ("href", "src", "xlink:href") and v]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    (folder / "text.txt").write_text(small_text(2500))
    for name, *settings in (
        ("words",),
        ("bytes", "tokenizer.kind=byte", "data.batching=sentence"),
        ("back", "model.backward=true"),
    ):
        config = tiny_config("train.max_steps=4", f'data.path="{folder / "text.txt"}"', *settings)
        api.train(config, folder / name, quiet=True)
    return folder


def test_the_page_of_several_models(runs, tmp_path):
    out = tmp_path / "report.html"
    others = [runs / "words", runs / "back"]
    numbers = api.report(runs / "words", out, against=[runs / "bytes", *others], others=[runs / "text.txt"])
    assert numbers["models"] == ["words (1)", "bytes", "words (3)", "back"]
    assert json.loads(json.dumps(numbers, allow_nan=False)) == numbers
    page = out.read_text(encoding="utf-8")
    checker = Checker()
    checker.feed(page)
    assert checker.open == [] and all(link.startswith("#") for link in checker.links)
    assert not re.search(r"https?://(?!www\.w3\.org/)", page)
    named = re.findall(r'<section id="([^"]+)">', page)
    assert set(named) >= {"summary", "calibration", "kinds", "frequency", "unknown", "line", "time", "distance", "context",
                          "switch", "sentences", "repetition", "arithmetic", "style", "worst-0", "worst-3", "apart"}  # fmt: skip
    assert len(set(named)) == len(named) and set(numbers["sections"]) == set(named)
    assert numbers["summary"]["words (1)"] == numbers["summary"]["words (3)"]
    values = api.evaluate(runs / "words", batch_size=8)
    mine = numbers["summary"]["words (1)"]
    for key in ("ppl", "ppl_word", "bpc", "bpb", "mrr", "top5", "oov_rate"):
        assert mine[key] == pytest.approx(values[key], rel=1e-6), key


def test_the_text_is_read_as_it_was_written(tmp_path):
    """A word model's decoding knows no white space; another model must not be asked to read that instead."""
    (tmp_path / "text.txt").write_text(small_text(600).replace("\n", " \n").replace(" and", "  and"))
    for name, kind in (("words", "word"), ("bytes", "byte")):
        config = tiny_config("train.max_steps=2", f'data.path="{tmp_path / "text.txt"}"', f"tokenizer.kind={kind}")
        api.train(config, tmp_path / name, quiet=True)
    here = [tmp_path / "words", tmp_path / "bytes"]
    found = api.report(here[0], tmp_path / "a.html", against=here[1:])["summary"]["bytes"]
    assert found["bpb"] == pytest.approx(api.evaluate(here[1], batch_size=8)["bpb"], rel=1e-6)
    (tmp_path / "text.txt").write_text("something else\n" * 99)
    other = api.report(here[0], tmp_path / "b.html", against=here[1:])["summary"]
    assert other["bytes"]["bpb"] != pytest.approx(found["bpb"], rel=1e-6)
    streams = 360 // 64  # of so short a text
    assert other["words"]["bpb"] == pytest.approx(api.evaluate(here[0], batch_size=streams)["bpb"], rel=1e-6)


def test_two_reports_are_equal(runs, tmp_path):
    pages = []
    for name in ("a.html", "b.html"):
        api.report(runs / "words", tmp_path / name)
        pages.append(re.sub(r"seconds for the reading</th>.*?</tr>", "", (tmp_path / name).read_text()))
    assert pages[0] == pages[1]


def test_a_short_text_leaves_out_what_needs_a_long_one(runs, tmp_path):
    (tmp_path / "short.txt").write_text(small_text(9))
    numbers = api.report(runs / "words", tmp_path / "r.html", data=tmp_path / "short.txt")
    assert "context" not in numbers["sections"] and numbers["words"] == 9 * 12


def test_nothing_is_measured_when_the_page_cannot_be_written(runs, tmp_path):
    (tmp_path / "old.html").write_text("mine")
    for out, words in (
        (tmp_path / "old.html", "--force"),
        (tmp_path / "r.txt", "ends in .html"),
        (tmp_path / "no" / "r.html", "no such folder"),
    ):
        with pytest.raises(UserError, match=words):
            api.report(runs / "no-such-run", out)
    assert (tmp_path / "old.html").read_text() == "mine"


def test_charts_and_cells():
    chart = Chart("n", "bits", [Series("a & b", [1, 2, 5], [3.0, 2.0, 1.0])], log=True)
    assert svg(chart, "x") == svg(chart, "x") != svg(chart, "y")
    assert "<metadata" not in svg(chart, "x") and 'role="img"' in svg(chart, "x")
    assert [shown(v) for v in (None, 3, 12345.6, 123.45, 1.234)] == ["–", "3", "12,346", "123.5", "1.23"]
    assert shown(0.5, "share %") == "50.0" and shown(1111, "seed") == "1111" and shown(1111, "epochs") == "1,111"
    assert "&lt;b&gt;" in table(Table(["", "x"], [["<b>", "<i>"]])) and "<i>" not in table(
        Table(["", "x"], [["<b>", "<i>"]])
    )
    assert "--s:1.00" in coloured(["<w>"], [99.0]) and "&lt;w&gt;" in coloured(["<w>"], [99.0])


@pytest.mark.parametrize("spread", [1.01, 1.4, 3.0, 1e4])
@pytest.mark.parametrize("lowest", [0.31, 1.02, 1.06, 9.4, 58.4, 91.0, 104.0, 1225.0])
def test_a_logarithmic_axis_has_three_labels_at_least(lowest, spread):
    chart = Chart("x", "y", [Series("s", [0, 1], [lowest * spread, lowest])], ["a", "b"], log_y=True)
    labels = re.findall(r">([0-9.e+-]+)</text>", svg(chart, "x"))
    assert 3 <= len(labels) <= 12 and len(set(labels)) == len(labels)
