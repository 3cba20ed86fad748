"""The command line as a stranger meets it: light start, one sentence for a mistake, the right exit code."""

import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from recurlm import files
from recurlm.cli.common import duration, print_table
from recurlm.text.store import RETURNS
from support import TINY, small_text

HEAVY = ("torch", "numpy", "tokenizers", "numba", "safetensors", "matplotlib", "tensorboard")


def run(*arguments: str, stdin: str | bytes | None = None) -> subprocess.CompletedProcess:
    data = stdin.encode() if isinstance(stdin, str) else stdin
    done = subprocess.run([sys.executable, "-m", "recurlm", *arguments], input=data or b"", capture_output=True)
    done.stdout, done.stderr = done.stdout.decode(), done.stderr.decode()
    return done


@pytest.mark.parametrize("code", ["import recurlm; recurlm.Config()", "from recurlm.cli.main import app"])
def test_nothing_heavy_is_imported_before_it_is_used(code):
    check = f"import sys; {code}; print([m for m in {HEAVY!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


def test_help_names_every_verb():
    text = run("--help").stdout
    for verb in ("demo", "data", "train", "eval", "score", "generate", "embed"):
        assert f" {verb} " in text
    assert run("--version").stdout.startswith("recurlm 0.")


@pytest.fixture(scope="module")
def trained(text_file, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("cli") / "run"
    settings = [part for setting in (*TINY, "train.max_steps=30") for part in ("--set", setting)]
    done = run("train", "--data", str(text_file), "-o", str(folder), "--json", *settings)
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert facts["steps"] == 30 and facts["best_on"] == "valid"
    assert "valid loss" in done.stderr
    return folder


def test_the_run_directory_is_complete(trained):
    names = {path.name for path in trained.iterdir()}
    wanted = {
        "manifest.json",
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "README.md",
        "config.toml",
        "metrics.jsonl",
    }
    assert wanted | {"checkpoints", "store"} <= names
    assert not [name for name in names if "tmp" in name]
    assert "recurlm.load" in (trained / "README.md").read_text()


def test_eval_prints_and_keeps_the_metrics(trained):
    values = json.loads(run("eval", str(trained), "--json").stdout)
    for name in (
        "loss_nats",
        "ppl",
        "ppl_word",
        "bpc",
        "bpb",
        "top1",
        "top5",
        "top10",
        "mrr",
        "oov_rate",
        "tokens_per_s",
        "rule",
    ):
        assert name in values
    kept = json.loads((trained / "eval.json").read_text())
    assert kept["ppl"] == values["ppl"]
    other = json.loads(
        run("eval", str(trained), "--json", "--split", "valid", "--batch-size", "7", "--no-ranks").stdout
    )
    assert "top1" not in other and other["split"] == "valid"
    both = [json.loads((trained / name).read_text()) for name in ("eval.json", "eval-valid.json")]
    assert [b["split"] for b in both] == ["test", "valid"] and both[0]["step"] == both[1]["step"] > 0
    assert "ppl " in run("eval", str(trained)).stdout
    kept = (trained / "eval.json").read_text()
    for another_way in (("--counting", "published", "--batch-size", "9"), ("--batching", "sentence")):
        assert run("eval", str(trained), "--no-ranks", *another_way).returncode == 0
        assert (trained / "eval.json").read_text() == kept


def test_eval_reads_another_text(trained, tmp_path):
    (tmp_path / "new.txt").write_text(small_text(40, seed=9))
    before = {path.name: path.read_text() for path in trained.glob("eval*.json")}
    values = json.loads(run("eval", str(trained), "--json", "--data", str(tmp_path / "new.txt")).stdout)
    assert values["targets"] == 40 * 12
    assert {path.name: path.read_text() for path in trained.glob("eval*.json")} == before


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_verbs_that_read_a_text_say_so_where_lines_end_with_a_carriage_return(tmp_path, end):
    text, model = tmp_path / "new.txt", tmp_path / "model"
    text.write_bytes(small_text(60, seed=9).replace("\n", end).encode())
    for arguments in (
        ("data", "prepare", text, "--tokenizer", "bpe", "-o", tmp_path / "store", "--json"),
        ("ngram", "train", text, "--tokenizer", "char", "--order", 2, "--smoothing", "katz", "-o", model, "--json"),
        ("eval", model, "--data", text, "--json"),
        ("score", model, text, "--json"),
    ):
        done = run(*map(str, arguments))
        assert (done.returncode, done.stderr.count(RETURNS)) == (0, end != "\n"), (arguments, done.stderr)


def test_a_report_says_in_how_many_streams_it_reads(trained, tmp_path):
    measured = json.loads(run("eval", str(trained), "--json", "--no-ranks", "--batch-size", "1").stdout)
    for size, streams in ((("--batch-size", "1"), 1), ((), 8)):
        done = run("eval", str(trained), "--report", str(tmp_path / f"{streams}.html"), *size)
        ppl = float(done.stdout.splitlines()[1].split()[1])
        assert ppl == pytest.approx(measured["ppl"], rel=1e-5 if streams == 1 else 0.1)
        said = (done.stderr, (tmp_path / f"{streams}.html").read_text())
        assert all(("may differ a little" in text) == (streams > 1) for text in said)


def test_score_writes_rows(trained):
    done = run("score", str(trained), stdin="the king drinks a tea\n\nthe river\n")
    rows = [line.split("\t") for line in done.stdout.splitlines()]
    assert rows[0] == ["sentence_id", "token_id", "token", "surprisal"]
    assert [row[:3] for row in rows[1:3]] == [["1", "1", "the"], ["1", "2", "king"]]
    assert [row[0] for row in rows[1:]] == ["1"] * 6 + ["2"] + ["3"] * 3
    assert all(float(row[3]) >= 0 for row in rows[1:])
    sentences = run("score", str(trained), "--level", "sentence", stdin="the king drinks a tea\n").stdout.splitlines()
    assert float(sentences[1].split("\t")[2]) == pytest.approx(sum(float(row[3]) for row in rows[1:7]), abs=1e-4)
    row = json.loads(run("score", str(trained), "--json", "--unit", "log10", stdin="the king\n").stdout)
    assert row["unit"] == "log10" and row["total"] < 0 and row["tokens"][0] == "the"


def test_generate_repeats(trained):
    one = run("generate", str(trained), "--prompt", "the", "--tokens", "20", "--seed", "4").stdout
    assert one.startswith("the ")
    assert one == run("generate", str(trained), "--prompt", "the", "--tokens", "20", "--seed", "4").stdout
    assert json.loads(run("generate", str(trained), "--seed", "4", "--tokens", "3", "--json").stdout)["seed"] == 4


def test_prompt_and_stop_read_the_same_escapes(trained):
    def text(*options):
        return json.loads(run("generate", str(trained), "--json", "--tokens", "300", "--seed", "2", *options).stdout)

    free = text("--prompt", r"the\nking\t\\n \x")
    assert free["prompt"] == "the\nking\t\\n \\x"
    stopped = text("--prompt", r"the\nking\t\\n \x", "--stop", r"\n")
    new = free["text"].removeprefix(free["prompt"])
    assert "\n" in new and stopped["text"] == free["prompt"] + new.partition("\n")[0]


def test_beams_give_rows_or_a_text(trained):
    arguments = ("generate", str(trained), "--prompt", "the king", "--tokens", "6", "--beams", "4")
    rows = [line.split("\t") for line in run(*arguments, "--num-return", "3").stdout.splitlines()]
    assert rows[0] == ["rank", "score", "log_prob", "text"] and [row[0] for row in rows[1:]] == ["1", "2", "3"]
    assert float(rows[1][1]) >= float(rows[2][1]) >= float(rows[3][1])
    kept = json.loads(run(*arguments, "--json").stdout)["hypotheses"]
    assert len(kept) == 1 and run(*arguments).stdout == kept[0]["text"] + "\n"
    assert rows[1][3] == kept[0]["text"].replace("\n", "\\n")


def test_eval_reads_a_folder_with_the_split_asked_for_only(trained, tmp_path):
    (tmp_path / "test.txt").write_text(small_text(40, seed=9))
    assert json.loads(run("eval", str(trained), "--json", "--data", str(tmp_path)).stdout)["targets"] == 40 * 12
    done = run("eval", str(trained), "--data", str(tmp_path), "--split", "valid")
    assert done.returncode == 2 and "it has test" in done.stderr
    settings = [part for setting in TINY for part in ("--set", setting)]
    done = run("train", "--data", str(tmp_path), "-o", str(tmp_path / "run"), *settings)
    assert done.returncode == 2 and "no train text" in done.stderr


def test_an_interruption_in_a_callback_costs_one_line():
    """Python can only report what is raised there, so the process goes on, and knows the signal's number."""
    code = """if True:
        import signal, sys, weakref
        from recurlm.cli.signals import listen

        class It: pass

        stopped, it = listen(), It()
        seen = weakref.ref(it, lambda _: signal.raise_signal(signal.SIGTERM))
        del it
        sys.exit(128 + stopped[0])
    """
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (found.returncode, found.stderr) == (143, "recurlm: interrupted (SIGTERM).\n")


@pytest.mark.parametrize("verb", ["score", "generate"])
def test_control_c_costs_one_line(trained, verb):
    """Interrupted in the middle of its output, the verb says so, without a traceback, and exits 130."""
    options = ["--tokens", "1000000"] if verb == "generate" else []
    process = subprocess.Popen(
        [sys.executable, "-m", "recurlm", verb, str(trained), *options],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout and process.stdin
    if verb == "score":
        process.stdin.write(b"the king\n" * 1500)  # more than one batch
        process.stdin.flush()
    process.stdout.read(200)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert error.decode().strip() == "recurlm: interrupted (SIGINT)."


def test_huge_figures_are_printed_in_scientific_notation(capsys):
    print_table({"ppl": 1.0142320547350045e304, "loss": 700.5, "tokens": 12_345_678, "big": 1e11})
    lines = capsys.readouterr().out.splitlines()
    assert lines == ["ppl     1.0142e+304", "loss    700.5000", "tokens  12,345,678", "big     100,000,000,000.0000"]


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(0.4, "0 s"), (59, "59 s"), (60, "1 min"), (3569, "59 min"), (3571, "1 h 0 min"), (12_286, "3 h 25 min"),
     (1.7e5, "47 h 13 min"), (1.8e5, "2 days 2 h"), (1e9, "11574 days 2 h")],
)  # fmt: skip
def test_durations_are_said_in_the_unit_that_fits(seconds, said):
    assert duration(seconds) == said


@pytest.mark.parametrize(
    ("number", "said"),
    [(0, "0 bytes"), (834, "834 bytes"), (1780, "1.78 kB"), (90_181_324, "90.18 MB"), (140 * 10**9, "140 GB")],
)  # fmt: skip
def test_sizes_are_said_in_the_unit_that_fits(number, said):
    assert files.size(number) == said


def test_dry_run_writes_nothing(text_file, tmp_path):
    settings = [part for setting in TINY for part in ("--set", setting)]
    done = run("train", "--data", str(text_file), "--dry-run", "--json", "-o", str(tmp_path / "run"), *settings)
    facts = json.loads(done.stdout)
    assert facts["parameters"] == sum_of_parameters(facts["vocab_size"])
    assert (
        facts["memory_bytes"] > 0 and facts["seconds_estimated"] > 0 and facts["steps"] == facts["steps_per_epoch"] * 10
    )
    assert not (tmp_path / "run").exists()
    shown = run("train", "--data", str(text_file), "--dry-run", *settings).stdout
    assert re.search(r"\nmemory +[\d.]+ [MG]B\n", shown) and "memory_bytes" not in shown


def sum_of_parameters(vocab: int) -> int:
    first, second = 4 * 16 * (12 + 16 + 2), 4 * 12 * (16 + 12 + 2)
    return vocab * 12 + first + second + vocab


def test_debug_shows_the_traceback(tmp_path):
    assert "Traceback" in run("--debug", "eval", str(tmp_path)).stderr


def test_a_reader_that_leaves_early_is_no_error(trained):
    shell = f"yes 'the king' | head -n 3000 | {sys.executable} -m recurlm score {trained} | head -n 2"
    done = subprocess.run(["bash", "-c", shell], capture_output=True, text=True)
    assert done.stdout.startswith("sentence_id")
    assert "Traceback" not in done.stderr


def test_dry_run_of_a_text_of_ten_lines(tmp_path):
    (tmp_path / "ten.txt").write_text(small_text(10))
    settings = [part for setting in TINY for part in ("--set", setting)]
    done = run("train", "--data", str(tmp_path / "ten.txt"), "--dry-run", "--json", *settings)
    assert json.loads(done.stdout)["tokens"]["train"] == 8 * 12, done.stderr
