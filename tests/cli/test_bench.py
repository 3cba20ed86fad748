"""`recurlm bench`: what is run, skipped and refused, and what is printed and kept. No time is compared with another."""

import json
import subprocess
import sys

import pytest

from recurlm import bench
from recurlm.bench.timing import Row
from recurlm.cli import main

ROW = Row(measure="pool", shape="70 x 20 x 1,150", ours_us=20.0, peer_us=50.0, peer="torch", limit_us=15.0).as_dict()
KEYS = {"recurlm", "commit", "date", "command", "machine", "results", "skipped", "failed"}


def fail():
    raise RuntimeError("no\nluck")


@pytest.fixture(autouse=True)
def measurements(monkeypatch):
    monkeypatch.setattr(
        bench,
        "MEASUREMENTS",
        {
            "pooling": bench.Measurement("pooling on the CPU", lambda: [ROW]),
            "gpu-pooling": bench.Measurement("pooling on the GPU", lambda: [ROW], lambda: "it needs a CUDA GPU"),
        },
    )


@pytest.fixture
def run(monkeypatch, capsys):
    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["/somewhere/recurlm", "bench", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            main.run()
        return caught.value.code, *capsys.readouterr()

    return run


@pytest.mark.parametrize("columns", [80, 120])
def test_a_table_a_measurement_and_a_line_for_what_is_skipped(run, monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    code, out, err = run()
    assert code == 0
    assert out.splitlines()[0].strip() == "pooling" and max(map(len, out.splitlines())) <= columns
    for cell in ("20.0 us", "50.0 us", "2.50", "15.0 us", "75%", "torch", "70 x 20 x 1,150"):
        assert cell in out
    assert err == "Measuring pooling ...\ngpu-pooling: skipped: it needs a CUDA GPU\n"


def test_json_is_one_object(run):
    code, out, _ = run("--json")
    record = json.loads(out)
    assert code == 0 and record.keys() == KEYS and out.count("\n") == 1
    assert record["results"] == {"pooling": [ROW]} and record["failed"] == {}
    assert record["skipped"] == {"gpu-pooling": "it needs a CUDA GPU"}
    assert record["command"] == "recurlm bench --json"
    assert {"cpu", "threads", "gpus", "torch", "triton", "python"} <= record["machine"].keys()


def test_the_result_is_kept_in_a_folder(run, tmp_path):
    code, _, err = run("-o", tmp_path / "new" / "results", "pooling")
    (file,) = (tmp_path / "new" / "results").iterdir()
    assert code == 0 and f"Kept in {file}" in err
    assert json.loads(file.read_text()).keys() == KEYS


def test_nothing_is_kept_without_a_folder(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run("pooling")[0] == 0 and not list(tmp_path.iterdir())


def test_list(run):
    code, out, _ = run("--list")
    assert code == 0 and out.splitlines() == [
        "pooling      pooling on the CPU",
        "gpu-pooling  pooling on the GPU",
        "             not here: it needs a CUDA GPU",
    ]
    listed = json.loads(run("--list", "--json", "pooling")[1])["measurements"]
    assert listed == [{"name": "pooling", "what": "pooling on the CPU", "lacks": ""}]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["poolin"], "Did you mean 'pooling'"),
        (["--list", "poolin"], "Did you mean 'pooling'"),
        (["pooling", "gpu-pooling"], "gpu-pooling: it needs a CUDA GPU"),
        (["pooling", "-o", "file"], "cannot keep results there"),
        (["--threads", "0"], "--threads"),
    ],
)
def test_mistakes_cost_one_sentence_and_nothing_is_measured(run, arguments, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("mine")
    code, out, err = run(*arguments)
    assert code == 2 and out == "" and words in err
    assert err.startswith("recurlm: ") and err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    ("rows", "why"),
    [
        (fail, "RuntimeError: no luck"),
        (lambda: [{**ROW, "ours_us": float("nan")}], "not JSON compliant"),
        (lambda: [{"measure": "x"}], "a row has no shape"),
    ],
)
def test_a_failing_measurement_costs_no_other(run, monkeypatch, tmp_path, rows, why):
    monkeypatch.setattr(bench, "MEASUREMENTS", {"bad": bench.Measurement("bad", rows), **bench.MEASUREMENTS})
    code, out, err = run("--json", "-o", tmp_path)
    record = json.loads(out)
    assert code == 1 and "recurlm: Failed: bad." in err
    assert why in record["failed"]["bad"] and record["results"] == {"pooling": [ROW]}
    assert json.loads(next(tmp_path.iterdir()).read_text())["failed"] == record["failed"]


def test_the_real_list_through_the_shell():
    done = subprocess.run(
        [sys.executable, "-m", "recurlm", "bench", "--list", "--json"], capture_output=True, text=True
    )
    names = [it["name"] for it in json.loads(done.stdout)["measurements"]]
    assert {"startup", "inference"} <= set(names), done.stderr
