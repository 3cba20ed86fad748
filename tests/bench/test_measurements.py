"""Each measurement really measures two ways to the same result; small sizes, and no time is compared with another."""

import functools
import json
from pathlib import Path

import pytest
import torch

from recurlm import bench
from recurlm.bench import cross_entropy, hardware, inference, startup, step_kernels, timing
from recurlm.errors import RunError


@pytest.fixture
def small(monkeypatch):
    for name, value in {"EMBEDDING": 8, "HIDDEN": 16, "LINES": 3, "CHARACTERS": 9, "GENERATED": 12}.items():
        monkeypatch.setattr(inference, name, value)
    monkeypatch.setattr(inference, "cpu_time", lambda works, **_: timing.cpu_time(works, seconds=0, rounds=1))


def test_plain_torch_is_the_same_model(small):
    model, plain = inference.example()
    start, unknown = model.tokenizer.boundary_id, model.tokenizer.unk_id
    ids = {by_cells: plain.greedy(start, 12, [unknown], by_cells=by_cells) for by_cells in (False, True)}
    assert ids[False] == ids[True]
    assert model.tokenizer.decode(ids[True]) == model.generate(tokens=12, temperature=0)


def test_inference_rows(small):
    rows = inference.rows()
    assert [(row["measure"], row["shape"]) for row in rows] == [
        ("score, a token", "3 x 9"),
        ("score, a token", "1 x 9"),
        *[("generate, a token", "1 x 12")] * 2,
    ]
    assert all(row["peer_us"] > 0 and row["rate"].endswith(" tokens/s") for row in rows)


def test_inference_refuses_to_time_two_different_models(small, monkeypatch):
    monkeypatch.setattr(inference.Plain, "nll", lambda self, block_TB: torch.zeros(block_TB[1:].shape))
    with pytest.raises(RunError, match="other losses"):
        inference.rows()


def test_hardware_rows(monkeypatch):
    monkeypatch.setattr(hardware, "copy_bandwidth", lambda device: 2e12)
    monkeypatch.setattr(hardware, "gemm_rate", lambda dtype, device: 1e12)
    rows = {row["measure"]: row for row in hardware.rows()}
    assert rows["copy on cpu"]["ours_us"] == 1 and rows["copy on cpu"]["rate"] == "2,000.0 GB/s"
    assert rows["bf16 product on cpu"]["rate"] == "1.00 TFLOP/s" and "tf32 product on cpu" not in rows
    assert ("fp32 product on cuda" in rows) == torch.cuda.is_available()


def test_startup_row(monkeypatch):
    monkeypatch.setattr(startup, "cpu_time", functools.partial(timing.cpu_time, seconds=0))
    monkeypatch.setattr(startup, "COMMANDS", {name: ["-c", "pass"] for name in startup.COMMANDS})
    (row,) = startup.rows()
    assert row["peer"] == "import torch" and row["limit_us"] > 0 and row["share"] > 0


@pytest.mark.skipif(bench.gpu_with_triton() != "", reason="no GPU with Triton here")
@pytest.mark.filterwarnings(
    "ignore:The AccumulateGrad node:UserWarning"
)  # of the leaves, used on the stream that captures
def test_rows_of_the_gpu_kernels(monkeypatch):
    monkeypatch.setattr(cross_entropy, "SHAPES", {"small": ((60, 40, 500), "soon")})
    monkeypatch.setattr(step_kernels, "SIZES", {"small": (5, 4, 300)})
    for row in cross_entropy.rows() + step_kernels.rows():
        assert row["ours_us"] > 0 and row["peer_us"] > 0 and row["limit_us"] > 0


@pytest.mark.parametrize("name", bench.MEASUREMENTS)
def test_every_measurement_says_what_it_is(name):
    it = bench.MEASUREMENTS[name]
    assert it.what and not it.what.endswith(".") and callable(it.rows) and isinstance(it.lacks(), str)


def test_what_the_gpu_measurements_lack(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "GPU" in bench.gpu() and "GPU" in bench.gpu_with_triton()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(bench.doctor, "versions", lambda: {"triton": ""})
    assert bench.gpu() == "" and "triton" in bench.gpu_with_triton()


def test_the_record_is_kept_after_each_measurement(tmp_path, monkeypatch):
    row = timing.Row(measure="m", shape="s", ours_us=2.0).as_dict()
    kept = []

    def look():
        kept.append(json.loads(next(tmp_path.glob("*.json")).read_text()))
        return [row]

    monkeypatch.setattr(bench, "MEASUREMENTS", {name: bench.Measurement(name, look) for name in ("one", "two")})
    record = bench.run(out=tmp_path)
    assert [sorted(content["results"]) for content in kept] == [[], ["one"]]
    assert json.loads(Path(record.pop("file")).read_text()) == record
    assert bench.run(["two"], out=tmp_path)["results"] == {"two": [row]}
    assert len(list(tmp_path.iterdir())) == 2
