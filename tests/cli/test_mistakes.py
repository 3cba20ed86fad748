"""Mistakes at the command line: one sentence on stderr, nothing on stdout, the right exit code, nothing lost or made."""

import gzip
import hashlib
import io
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from recurlm import api
from recurlm.cli import main
from recurlm.config import apply_assignments
from recurlm.text.store import prepare
from support import small_text, tiny_config

TRAIN = "train --data text.txt -o new"
# Arguments (relative to a folder of odd files), exit code, words of the sentence.
MISTAKES: list[tuple[str, int, str]] = [
    # no such verb, option or argument
    ("trian", 2, "Did you mean 'train'"),
    ("data gett", 2, "Did you mean 'get'"),
    ("train --no-such-option", 2, "--no-such-option"),
    ("train --data", 2, "--data"),
    ("train a b", 2, "unexpected"),
    ("eval", 2, "Missing argument"),
    ("score", 2, "Missing argument"),
    ("generate", 2, "Missing argument"),
    ("data prepare", 2, "Missing argument"),
    ("data prepare text.txt", 2, "--out"),
    ("data get", 2, "Missing argument"),
    (f"{TRAIN} --seed x", 2, "--seed"),
    ("generate run --tokens many", 2, "--tokens"),
    ("eval run --batch-size 1.5", 2, "--batch-size"),
    # train: what is missing or contradicts
    ("train", 2, "-o"),
    ("train -o new", 2, "--data"),
    ("train --data text.txt", 2, "-o"),
    ("train --dry-run", 2, "--data"),
    (f"{TRAIN} --dry-run --max-time 10m", 2, "leave one of them out"),
    ("train --resume auto -o nothing", 2, "no run here to go on with"),
    ("train --resume auto -o text.txt", 2, "text.txt"),
    (f"{TRAIN} --resume yes", 2, "--resume"),
    (f"{TRAIN} --stages 2", 2, "the number of stages"),
    ("ngram train text.txt -o new --memory-limit 1kg", 2, "'1kg' is none"),
    ("ngram train text.txt -o new --tokenizer-of new --tokenizer bpe", 2, "leave out what would make another one"),
    ("ngram train text.txt -o new --tokenizer-of absent", 2, "cannot read this tokenizer"),
    ("train --data text.txt -o run", 2, "already holds a run"),
    ("train --data text.txt -o mine", 2, "README.md"),
    ("train --data text.txt -o modelonly --resume auto", 2, "no checkpoints folder"),
    ("train --data text.txt -o text.txt/new", 2, "run directory"),
    ("train --data text.txt -o text.txt", 2, "a file; choose a folder"),
    ("train -o run --resume auto --set model.hidden_size=99", 2, "model.hidden_size is 99"),
    ("train -o run --resume auto --set data.bptt=99", 2, "data.bptt is 99"),
    ("train -o run --resume auto --data other.txt", 2, "data.path is"),
    ("train -o badtoml --resume auto", 2, "config.toml"),
    ("train -o badcheckpoints --resume auto", 3, "no checkpoint is usable"),
    # train: the text
    ("train --data no.txt -o new", 2, "no.txt: no such file"),
    ("train --data empty.txt -o new", 3, "empty.txt"),
    ("train --data two.txt -o new", 3, "at least 3 lines"),
    ("train --data latin.txt -o new", 3, "UTF-8"),
    ("train --data pipe -o new", 2, "not a regular file"),
    ("train --data dangling -o new", 2, "dangling"),
    ("train --data folder -o new", 2, "no train text"),
    ("train --data twice -o new", 2, "keep one"),
    ("train --data cut.txt.gz -o new", 3, "damaged or cut short"),
    ("train --data raw.txt.gz -o new", 3, "damaged or cut short"),
    ("train --data bad.jsonl -o new", 3, "JSON object"),
    ("train --data run -o new", 2, "a run directory"),
    ("train --data badstore -o new", 3, "train.bin"),
    ("train --data shakespear -o new", 2, "shakespear"),
    ("train --data wikitext-2 -o new", 2, "data get wikitext-2"),
    (f"train --data {'x' * 5000} -o new", 2, "not a possible path"),
    ("train --data caf\udce9.txt -o new", 2, "UTF-8"),
    # train: recipes and settings
    ("train awd-lstm-pbt --data text.txt -o new", 2, "Did you mean 'awd-lstm-ptb'"),
    ("train text.txt -o new", 2, "give it by --data"),
    ("train no-such -o new", 2, "ends with .toml"),
    ("train no.toml --data text.txt -o new", 2, "no.toml"),
    ("train bad.toml --data text.txt -o new", 2, "bad.toml"),
    ("train unknown.toml --data text.txt -o new", 2, "Did you mean 'layer'"),
    ("train folder.toml --data text.txt -o new", 2, "folder.toml"),
    (f"{TRAIN} --set lr", 2, "section.key=value"),
    (f"{TRAIN} --set lr=3", 2, "section.key=value"),
    (f"{TRAIN} --set =3", 2, "section.key=value"),
    (f"{TRAIN} --set model.layr=lstm", 2, "Did you mean 'layer'"),
    (f"{TRAIN} --set modell.layer=lstm", 2, "Did you mean 'model'"),
    (f"{TRAIN} --set model.layer=no-such-layer", 2, "model.layer"),
    (f"{TRAIN} --set model.head=no-such-head", 2, "model.head"),
    (f"{TRAIN} --set model.hidden_sizes=[8,9]", 2, "embedding_size"),
    (f"{TRAIN} --set model.hidden_sizes=8", 2, "expected a list"),
    (f"{TRAIN} --set model.embedding_size=1000000000000", 2, "from 1 to 65,536"),
    (f"{TRAIN} --set model.hidden_size=65536 --set model.num_layers=256", 1, "GB are free"),
    (f"{TRAIN} --set optimizer.name=no-such", 2, "optimizer.name"),
    (f"{TRAIN} --set optimizer.lr=-1", 2, "optimizer.lr"),
    (f"{TRAIN} --set optimizer.lr=nan", 2, "finite"),
    (f"{TRAIN} --set optimizer.betas=[0.9]", 2, "two numbers"),
    (f"{TRAIN} --set schedule.name=no-such", 2, "schedule.name"),
    (f"{TRAIN} --set averaging.name=no-such", 2, "averaging.name"),
    (f"{TRAIN} --set tokenizer.kind=words", 2, "Did you mean 'word'"),
    (f"{TRAIN} --set tokenizer.vocab_size=3", 2, "too small"),
    (f"{TRAIN} --set data.batch_size=0", 2, "from 1 to 65,536"),
    (f"{TRAIN} --set data.batch_size=big", 2, "whole number"),
    (f"{TRAIN} --set train.seed=-1", 2, "train.seed"),
    (f"{TRAIN} --set train.tensorboard=perhaps", 2, "true or false"),
    (f"{TRAIN} --seed -1", 2, "train.seed"),
    (f"{TRAIN} --device gpu", 2, "device"),
    (f"{TRAIN} --device cuda:99", 2, "cuda:99"),
    (f"{TRAIN} --dtype fp8", 2, "dtype"),
    (f"{TRAIN} --threads many", 2, "--threads"),
    (f"{TRAIN} --threads 0", 2, "--threads"),
    (f"{TRAIN} --max-time soon", 2, "--max-time"),
    (f"{TRAIN} --max-time -5", 2, "--max-time"),
    # eval
    ("eval nothing", 2, "no such folder"),
    ("eval folder", 2, "not a run directory"),
    ("eval text.txt", 2, "a file; expected a run directory"),
    ("eval store", 2, "a store of tokens"),
    ("eval run/checkpoints", 2, "Give the run directory itself"),
    ("eval run/checkpoints/step-6", 2, "a checkpoint"),
    ("eval onlycheckpoints", 2, "checkpoints only"),
    ("eval badweights", 3, "model.safetensors"),
    ("eval badtokenizer", 3, "tokenizer.json"),
    ("eval badmanifest", 3, "manifest.json"),
    ("eval run --split tests", 2, "no split"),
    ("eval run --counting nice", 2, "counting"),
    ("eval run --batch-size 0", 2, "batch_size"),
    ("eval run --data no.txt", 2, "no.txt"),
    ("eval run --suite blip", 2, "blimp, lambada, gulordava"),
    ("eval run --suite blimp", 2, "--from DIR"),
    ("eval run --suite blimp --from folder", 2, "--from DIR"),
    ("eval run --suite no.jsonl", 2, "no.jsonl"),
    ("eval run --suite bad.jsonl", 3, "line 1"),
    ("eval run --suite folder.jsonl", 2, "folder.jsonl"),
    ("eval run --suite own.jsonl --text-rule pbt", 2, "Did you mean 'ptb'"),
    ("eval run --suite own.jsonl --data text.txt", 2, "leave out --report"),
    ("eval run --suite own.jsonl --report r.html", 2, "leave out --report"),
    ("eval run --from folder", 2, "give --suite"),
    ("eval run --against run", 2, "give --report"),
    ("eval run --report r.txt", 2, "ends in .html"),
    ("eval run --report no/r.html", 2, "no such folder"),
    ("eval run --report mine.html", 2, "--force"),
    ("eval run --report r.html --against nothing", 2, "no such folder"),
    ("eval run --report r.html --other no.txt", 2, "no.txt"),
    ("eval run --report r.html --other latin.txt", 3, "UTF-8"),
    ("eval run --report r.html --other empty.txt", 2, "too short"),
    ("eval run --report r.html --split tests", 2, "no split"),
    ("eval run --report r.html --batch-size 0", 2, "batch_size"),
    ("eval run --data empty.txt", 3, "empty"),
    ("eval run --data run", 2, "a run directory"),
    ("eval run --data charstore", 3, "another tokenizer"),
    ("eval modelonly", 2, "--data"),
    ("eval run --device tpu", 2, "device"),
    ("eval run --dtype int8", 2, "dtype"),
    ("eval run --threads -1", 2, "--threads"),
    # score
    ("score nothing", 2, "no such folder"),
    ("score run no.txt", 2, "no.txt"),
    ("score run folder", 2, "folder"),
    ("score run latin.txt", 3, "line 1"),
    ("score run cut.txt.gz", 3, "damaged or cut short"),
    ("score run raw.txt.gz", 3, "damaged or cut short"),
    ("score run bad.jsonl", 2, "not jsonl"),
    ("score run --unit miles", 2, "miles"),
    ("score run --level page", 2, "--level"),
    # generate
    ("generate nothing", 2, "no such folder"),
    ("generate run --temperature -3", 2, "temperature"),
    ("generate run --temperature nan", 2, "temperature"),
    ("generate run --top-p 2", 2, "top_p"),
    ("generate run --top-p 0", 2, "top_p"),
    ("generate run --top-k -5", 2, "top_k"),
    ("generate run --tokens -5", 2, "tokens"),
    ("generate run --tokens 99999999999", 2, "tokens"),
    ("generate run --seed -1", 2, "seed"),
    ("generate run --min-p 1.5", 2, "min_p"),
    ("generate run --repetition-penalty nan", 2, "repetition_penalty"),
    ("generate run --beams 4 --top-k 3", 2, "none of the sampling options"),
    ("generate run --beams 4 --seed 3", 2, "none of the sampling options"),
    ("generate run --beams -1", 2, "beams"),
    ("generate run --beams 2 --num-return 3", 2, "num_return"),
    ("generate run --num-return 3", 2, "give --beams"),
    # embed
    ("embed nothing near king", 2, "no such folder"),
    ("embed run", 2, "Missing command"),
    ("embed run near kingg", 2, "Did you mean 'king'"),
    ("embed run near king --k 0", 2, "k = 0"),
    ("embed run analogy king tea queeeen", 2, "not in the vocabulary"),
    ("embed run analogy king tea bird --method div", 2, "add or mul"),
    ("embed run map -o map.png", 2, ".svg"),
    ("embed run map -o text.txt", 2, ".svg"),
    ("embed run map -o no/map.svg", 2, "cannot be written"),
    ("embed run map --top 1", 2, "top = 1"),
    # the range test
    (f"{TRAIN} --lr-find", 2, "writes a picture"),
    ("train --data text.txt --lr-find --dry-run", 2, "leave out"),
    ("train --data text.txt --lr-find --resume auto", 2, "leave out"),
    ("train --lr-find", 2, "--data"),
    ("train --data text.txt --lr-find -o no/lr.svg", 2, "no: no such folder"),
    ("train --data text.txt --lr-find --set optimizer.lr=0", 2, "above 0"),
    # what batches, layers and schedules are there
    (f"{TRAIN} --set data.batching=lines", 2, "data.batching"),
    (f"{TRAIN} --set data.batching=sentence --set data.counting=published", 2, "needs data.batching"),
    (f"{TRAIN} --set model.layer=qrnn --set dropout.recurrent=0.1", 2, "no hidden-to-hidden"),
    (f"{TRAIN} --set model.pooling=if", 2, "model.pooling"),
    (f"{TRAIN} --set optimizer.nesterov=true --set optimizer.name=sgd", 2, "needs optimizer.momentum"),
    (f"{TRAIN} --set schedule.cycles=0", 2, "from 1 to"),
    ("eval run --batching line", 2, "batching"),
    ("eval run --batching sentence --counting published", 2, "rule for one stream"),
    # data
    ("data get no-such-set", 2, "data set"),
    ("data get ptb --from nothing -o new", 2, "nothing"),
    ("data get ptb --from folder -o new", 2, "ptb"),
    ("data get ptb --from corpus -o new", 3, "not the published file"),
    ("data get ptb --from corpus -o folder", 2, "--force"),
    ("data prepare no.txt -o new", 2, "no.txt"),
    ("data prepare text.txt -o store", 2, "--force"),
    ("data prepare text.txt -o folder --force", 2, "not a store"),
    ("data prepare text.txt -o text.txt/new", 2, "text.txt/new"),
    ("data prepare text.txt -o new --tokenizer words", 2, "Did you mean 'word'"),
    ("data prepare text.txt -o new --vocab-size -4", 2, "vocab_size"),
    ("data prepare text.txt -o new --min-count 0", 2, "min_count"),
    ("data prepare text.txt -o new --vocab-splits some", 2, "vocab_splits"),
    ("data prepare empty.txt -o new", 3, "empty"),
    # n-grams, export
    ("ngram train text.txt -o new --arpa no/new.arpa", 2, "no: no such folder"),
    ("ngram train text.txt -o new --arpa folder", 2, "folder: a folder"),
    ("export run -o text.txt/new", 2, "text.txt/new: this folder cannot be made"),
    # demo
    ("demo -o folder", 2, "something else than a demo"),
    ("demo -o text.txt", 2, "text.txt"),
]  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run, a store, and everything odd that a name on the command line could mean."""
    here = tmp_path_factory.mktemp("mistakes")
    (here / "text.txt").write_text(small_text(100))
    (here / "other.txt").write_text(small_text(50, seed=3))
    (here / "empty.txt").write_text("")
    (here / "two.txt").write_text("one\ntwo\n")
    (here / "latin.txt").write_bytes("caf\xe9\n".encode("latin-1") * 50)
    (here / "bad.jsonl").write_text('{"title": "x"}\n' * 9)
    (here / "own.jsonl").write_text('{"good": "the king", "bad": "king the"}\n')
    (here / "mine.html").write_text("mine")
    (here / "folder.jsonl").mkdir()
    (here / "cut.txt.gz").write_bytes(gzip.compress(small_text(100).encode())[:-20])
    (here / "raw.txt.gz").write_text(small_text(50))
    (here / "bad.toml").write_text("[model\nlayer = ")
    (here / "unknown.toml").write_text('[model]\nlayr = "lstm"\n')
    for name in ("folder", "folder.toml", "twice", "mine", "corpus"):
        (here / name).mkdir()
        (here / name / "notes.md").write_text("mine")
    for name in ("train.txt", "my.train.txt"):
        (here / "twice" / name).write_text("a\nb\nc\n")
    for split in ("train", "valid", "test"):
        (here / "corpus" / f"{split}.txt").write_text(small_text(9))
    (here / "mine" / "README.md").write_text("mine")
    os.mkfifo(here / "pipe")
    (here / "dangling").symlink_to(here / "nothing-there")
    config = apply_assignments(
        tiny_config("train.max_steps=6", "train.checkpoint_every=3"), [f'data.path="{here / "text.txt"}"']
    )
    run = here / "run"
    api.train(config, run, quiet=True)
    prepare(here / "text.txt", config.tokenizer, here / "store")
    prepare(here / "text.txt", tiny_config("tokenizer.kind=char").tokenizer, here / "charstore")
    damages = {"badweights": "model.safetensors", "badtokenizer": "tokenizer.json", "badmanifest": "manifest.json"}
    for name, damaged in (damages | {"badtoml": "config.toml"}).items():
        shutil.copytree(run, here / name)
        data = bytearray((here / name / damaged).read_bytes())
        data[len(data) // 2] = 0
        (here / name / damaged).write_bytes(data)
    shutil.copytree(run, here / "badcheckpoints")
    for tensors in (here / "badcheckpoints").glob("checkpoints/*/tensors.safetensors"):
        tensors.write_bytes(b"")
    shutil.copytree(here / "store", here / "badstore")
    (here / "badstore" / "train.bin").write_bytes(b"12")
    shutil.copytree(run, here / "onlycheckpoints")
    shutil.copytree(run, here / "modelonly")
    for name in ("manifest.json", "model.safetensors"):
        (here / "onlycheckpoints" / name).unlink()
    for name in ("checkpoints", "store"):
        shutil.rmtree(here / "modelonly" / name)
    (here / "modelonly" / "config.toml").unlink()
    return here


def fingerprint(folder: Path) -> dict[str, str]:
    """Every name under the folder with what is there."""
    out = {}
    for path in sorted(folder.rglob("*")):
        kind = "link" if path.is_symlink() else "folder" if path.is_dir() else "file" if path.is_file() else "other"
        out[str(path.relative_to(folder))] = hashlib.sha256(path.read_bytes()).hexdigest() if kind == "file" else kind
    return out


def check(done: tuple[int, str, str], arguments: str, code: int, words: str) -> None:
    found, out, err = done
    assert found == code, err
    assert words in err
    assert err.startswith("recurlm: ") and err.count("\n") == 1 and err.endswith((".\n", "?\n")), err
    assert "Traceback" not in err and len(err) < 700
    assert out == ""


@pytest.mark.parametrize(("arguments", "code", "words"), MISTAKES, ids=[ascii(row[0])[1:61] for row in MISTAKES])
def test_a_mistake_costs_one_sentence(arguments, code, words, place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    monkeypatch.setenv("RECURLM_DATA", str(place / "data"))
    monkeypatch.setattr(sys, "argv", ["recurlm", *arguments.split(" ")])
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"the king\n")))
    before = fingerprint(place)
    with pytest.raises(SystemExit) as caught:
        main.run()
    out, err = capsys.readouterr()
    err = "\n".join(line for line in err.splitlines() if not line.startswith("Reading ")) + "\n"  # progress
    if path := os.environ.get("RECURLM_MESSAGES"):
        with Path(path).open("a", encoding="utf-8") as file:
            file.write(f"$ recurlm {ascii(arguments)[1:-1][:200]}\n  [{caught.value.code}] {err}")
    check((caught.value.code, out, err), arguments, code, words)
    assert fingerprint(place) == before


@pytest.mark.parametrize("number", range(3, len(MISTAKES), 25))
def test_the_same_through_the_shell(number, place):
    arguments, code, words = MISTAKES[number]
    before = fingerprint(place)
    command = [sys.executable, "-m", "recurlm", *arguments.split(" ")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=place, stdin=subprocess.DEVNULL)
    check((done.returncode, done.stdout, done.stderr), arguments, code, words)
    assert fingerprint(place) == before


def test_a_newline_in_a_name_stays_in_its_sentence(place, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["recurlm", "eval", "a\nrecurlm: all is well\x1b[2J"])
    with pytest.raises(SystemExit):
        main.run()
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "\x1b" not in err
