"""`recurlm ngram` and mixtures on the command line."""

import io
import json
import sys
from pathlib import Path

import pytest

from recurlm.api import train
from recurlm.cli.main import run
from support import tiny_config

FALLBACK = ["--discount-fallback", "0.5,1,1.5"]


@pytest.fixture
def call(monkeypatch, capsys):
    """Runs a command; (exit code, stdout, stderr)."""

    def caller(*arguments: object, stdin: bytes = b"") -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["recurlm", *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        with pytest.raises(SystemExit) as stopped:
            run()
        out, err = capsys.readouterr()
        return stopped.value.code or 0, out, err

    return caller


def test_train_prune_query_export_import(call, store, tmp_path):
    kn, small, theirs = tmp_path / "kn", tmp_path / "small", tmp_path / "theirs"
    code, out, _ = call("ngram", "train", store.path, "--order", 3, "-o", kn, "--arpa", tmp_path / "a.arpa", *FALLBACK)
    assert code == 0 and "ppl valid" in out
    code, out, _ = call("ngram", "prune", kn, "--threshold", "1e-3", "-o", small, "--json")
    assert code == 0 and json.loads(out)["run"] == str(small)
    code, out, _ = call("ngram", "export", kn, tmp_path / "b.arpa", "--json")
    assert code == 0 and json.loads(out) == {"file": str(tmp_path / "b.arpa")}
    assert (tmp_path / "a.arpa").read_bytes() == (tmp_path / "b.arpa").read_bytes()
    assert call("ngram", "import", tmp_path / "b.arpa", "-o", theirs)[0] == 0
    for verb in (["eval", kn], ["generate", small, "--tokens", 5], ["score", theirs]):
        code, out, err = call(*verb, stdin=b"the king sees it\n")
        assert code == 0 and out, err


def test_query(call, store, tmp_path):
    kn = tmp_path / "kn"
    assert call("ngram", "train", store.path, "--order", 3, "-o", kn, *FALLBACK)[0] == 0
    code, out, _ = call("ngram", "query", kn, "the king sees", "of zebra")
    rows = [line.split("\t") for line in out.splitlines()]
    assert code == 0 and rows[0] == ["sentence_id", "token_id", "token", "length", "log10"]
    assert [row[2:4] for row in rows[1:5]] == [["the", "2"], ["king", "3"], ["sees", "3"], ["<eos>", "1"]]
    assert [row[3] for row in rows[5:]] == ["0", "0", "1"]  # neither word was ever seen
    code, out, _ = call("ngram", "query", kn, "--summary", "--json", stdin=b"the king sees a bird\n")
    rows = json.loads(out)
    assert sum(row["tokens"] for row in rows[:-1]) == rows[-1]["tokens"] == 6
    code, out, _ = call("ngram", "query", kn, "the king", "the river", "king sees", "--next", 3, "--json")
    answer = json.loads(out)
    near, far = answer["pairs"][0]["divergence_bits"], answer["pairs"][1]["divergence_bits"]
    assert 0 <= near < far <= 1 and len(answer["next"]["the king"]) == 3
    assert call("ngram", "query", kn, "the king", "the river", "--next", 2)[1].count("Jensen-Shannon") == 1
    neural = Path(__file__).parents[1] / "golden" / "run"
    assert call("ngram", "query", neural, "the king", "the river", "--next", 2)[1].count("Jensen-Shannon") == 1


def test_mixtures(call, store, tmp_path):
    neural, kn, uni = tmp_path / "neural", tmp_path / "kn", tmp_path / "uni"
    train(tiny_config(f"data.path={store.path}", "train.max_steps=30"), neural, quiet=True)
    assert call("ngram", "train", store.path, "--order", 3, "-o", kn, *FALLBACK)[0] == 0
    assert call("ngram", "train", store.path, "--order", 1, "-o", uni, *FALLBACK)[0] == 0

    def loss(*arguments: object) -> dict:
        code, out, err = call("eval", *arguments, "--split", "valid", "--json")
        assert code == 0, err
        return json.loads(out)

    alone = [loss(model)["loss_nats"] for model in (neural, kn, uni)]
    mixed = loss(neural, "--with", kn, "--with", uni, "--cache", 5, "--cache", 50)
    assert mixed["loss_nats"] < min(alone) + 1e-5 and mixed["loss_nats"] == pytest.approx(
        mixed["tuned_loss_nats"], abs=1e-5
    )
    assert sum(mixed["weights"].values()) == pytest.approx(1) and len(mixed["weights"]) == 4
    assert (
        json.loads((neural / "eval-valid.json").read_text())["loss_nats"] == alone[0]
    )  # a mixture is not the run's own figure
    code, _, err = call("eval", neural, "--with", kn, "--tune-on", "dev")
    assert code == 2 and "no split 'dev'" in err


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["train", "TEXT", "-o", "NEW", "--order", "0"], 2, "order = 0"),
        (["train", "TEXT", "-o", "NEW", "--smoothing", "kneser"], 2, "'kneser-ney'"),
        (["train", "TEXT", "-o", "NEW", "--cutoffs", "0;1"], 2, "--cutoffs 0;1"),
        (["train", "TEXT", "-o", "NEW", "--cutoffs", "2,1"], 2, "do not fall"),
        (["train", "TEXT", "-o", "NEW", "--discount-fallback", "0.5,3,1"], 2, "--discount-fallback"),
        (["train", "TEXT", "-o", "NEW", "--tokenizer", "words"], 2, "word"),
        (["train", "absent.txt", "-o", "NEW"], 2, "no such file"),
        (["prune", "absent", "-o", "NEW"], 2, "not a run directory"),
        (["import", "absent.arpa", "-o", "NEW"], 2, "absent.arpa"),
        (["import", "TEXT", "-o", "NEW"], 3, "line 1"),
        (["query", "TEXT"], 2, "not a run directory"),
    ],
)
def test_mistakes_are_one_sentence_and_leave_nothing(arguments, code, says, call, text_file, tmp_path):
    places = {"TEXT": str(text_file), "NEW": str(tmp_path / "new")}
    found, _, err = call("ngram", *(places.get(a, a) for a in arguments))
    assert (found, err.count("\n")) == (code, 1) and says in err and "Traceback" not in err, err
    assert not Path(places["NEW"]).exists()


def test_models_of_two_tokenizers_do_not_mix(call, store, text_file, tmp_path):
    assert call("ngram", "train", store.path, "--order", 2, "-o", tmp_path / "a", *FALLBACK)[0] == 0
    other = ["--tokenizer", "char", *FALLBACK]
    assert call("ngram", "train", text_file, "--order", 2, "-o", tmp_path / "b", *other)[0] == 0
    code, _, err = call("eval", tmp_path / "a", "--with", tmp_path / "b")
    assert code == 2 and "another tokenizer" in err
