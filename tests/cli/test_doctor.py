"""`recurlm doctor`: what it says of this machine, and that it notices a kernel that is wrong here."""

import importlib.util
import json
import subprocess
import sys
import warnings

import pytest
import torch

from recurlm import doctor, kernels
from recurlm.cli import doctor as cli
from recurlm.cli import main
from recurlm.kernels import reference

KEYS = {
    "versions",
    "cpu",
    "gpus",
    "gpu_error",
    "precision",
    "kernels",
    "training_step",
    "numba_cache",
    "data",
    "warnings",
    "ok",
}
OPERATIONS = {operation for operation, _, _ in kernels.TABLE}
CPU = torch.device("cpu")


@pytest.fixture
def run(monkeypatch, capsys):
    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["recurlm", "doctor", *arguments])
        with pytest.raises(SystemExit) as caught:
            main.run()
        return caught.value.code, *capsys.readouterr()

    return run


@pytest.fixture
def no_triton(monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "triton" else real(name, *rest)
    )


def spoilt(monkeypatch, spoil):
    """What each fast function gives is changed by `spoil` before it is compared."""

    def check(fast, twin, look):
        return fast, twin, lambda function, *rest: (spoil if function is fast else list)(look(function, *rest))

    monkeypatch.setattr(doctor, "CHECKS", {name: check(*parts) for name, parts in doctor.CHECKS.items()})


def test_every_operation_is_checked():
    assert doctor.CHECKS.keys() == OPERATIONS


def test_facts_of_this_machine(run):
    code, out, err = run("--json")
    facts = json.loads(out)
    assert code == 0 and facts["ok"] and facts.keys() == KEYS and out.count("\n") == 1
    assert "Checking the kernels" in err
    rows = [row for row in facts["kernels"] if row["device"] == "cpu"]
    assert {row["operation"] for row in rows} == OPERATIONS
    assert all(row["check"] == "ok" and row["reason"] and 0 <= row["difference"] < 0.1 for row in rows)
    assert facts["versions"]["torch"] == torch.__version__
    assert facts["cpu"]["cores"] >= 1 and facts["cpu"]["threads"] == torch.get_num_threads()
    assert len(facts["gpus"]) == torch.cuda.device_count()
    assert len(facts["precision"]) == 1 + len(facts["gpus"])


def test_human_output(run, monkeypatch):
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    code, out, _ = run()
    assert code == 0
    sections = [line.partition(":")[0] for line in out.splitlines() if line and not line.startswith(" ")]
    assert sections == ["Versions", "CPU", "GPU", "--dtype auto", "Kernels", "Training step", "Folders", "Warnings"]
    assert "OMP_WAIT_POLICY=active" in out and all(f"  {name} on cpu" in out for name in OPERATIONS)


def test_a_gpu_is_shown(capsys):
    gpu = {"index": 0, "name": "GPU X", "capability": "9.0", "memory": 8e10, "memory_free": 7e10}
    row = {"operation": "pool", "device": "cuda:0", "dtype": "bfloat16", "function": "recurlm.kernels.pool_triton.pool",
           "reason": "triton 3.6", "check": "differs", "difference": 0.5, "said": "why"}  # fmt: skip
    facts = doctor.examine()
    gpus = [gpu | {"driver": "580.1", "cuda": "13.0", "cudnn": 91002}]
    cli._print(facts | {"gpus": gpus, "kernels": [row], "warnings": []})
    out = capsys.readouterr().out
    assert "0: GPU X, capability 9.0" in out and "driver 580.1, CUDA 13.0, cuDNN 91002" in out
    assert "pool on cuda:0: kernels.pool_triton.pool (triton 3.6)\n    bfloat16  differs  5.0e-01  why" in out


def off_by_a_little(found):
    return [part * 1.1 for part in found]


def not_finite(found):
    return [part * float("nan") for part in found]


def broken(found):
    raise RuntimeError("the compiler\nis missing")


@pytest.mark.parametrize(
    ("spoil", "check", "said"),
    [
        (off_by_a_little, "differs", ""),
        (not_finite, "differs", "its values are not finite"),
        (broken, "failed", "RuntimeError: the compiler is missing"),
    ],
)
def test_a_wrong_kernel_is_noticed(run, monkeypatch, spoil, check, said):
    spoilt(monkeypatch, spoil)
    code, out, err = run("--json")
    facts = json.loads(out)
    assert code == 1 and not facts["ok"] and "Traceback" not in err
    assert {(row["check"], row["said"]) for row in facts["kernels"]} == {(check, said)}
    code, out, _ = run()
    assert code == 1 and f" {check} " in out and said in out


def test_a_fast_twin_that_cannot_be_imported_fails(monkeypatch):
    def load():
        raise ImportError("numba needs another numpy")

    key = next(iter(kernels.TABLE))
    monkeypatch.setitem(kernels.TABLE, key, load)
    row = doctor._row(key[0], torch.device(key[1]), key[2])
    assert row["check"] == "failed" and row["said"] == "ImportError: numba needs another numpy"


def test_what_a_kernel_warns_of_is_said(monkeypatch):
    def warning(found):
        warnings.warn("slow here", RuntimeWarning, stacklevel=2)
        return found

    spoilt(monkeypatch, warning)
    assert {(row["check"], row["said"]) for row in doctor.kernel_checks(CPU)} == {("ok", "slow here")}


def test_without_triton_the_reference_serves_the_gpu_and_says_why(no_triton):
    for operation, device, dtype in kernels.TABLE:
        if device == "cuda":
            served = kernels.in_use(operation, device, dtype)
            assert "triton" not in served.function
            assert not served.slower or "triton is not installed" in served.reason
    assert kernels.in_use("pool", "cuda", torch.bfloat16).function == f"{reference.__name__}.pool"
    assert kernels.in_use("pool", "cuda", torch.bfloat16).slower


def test_triton_missing_from_the_versions(no_triton, monkeypatch):
    real = doctor.metadata.version

    def version(name):
        if name == "triton":
            raise doctor.metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(doctor.metadata, "version", version)
    assert doctor.versions()["triton"] == "" and doctor.versions()["torch"]


def test_with_triton_its_version_is_the_reason(monkeypatch):
    triton = pytest.importorskip("triton", reason="triton is not installed")
    served = kernels.in_use("pool", "cuda", torch.bfloat16)
    assert served.function == "recurlm.kernels.pool_triton.pool" and not served.slower
    assert served.reason.startswith(f"triton {triton.__version__}")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    served = kernels.in_use("pool", "cuda", torch.bfloat16)
    assert served.slower and "not compiled because TRITON_INTERPRET is set" in served.reason


def test_what_the_table_does_not_name_is_the_reference():
    for operation in OPERATIONS:
        served = kernels.in_use(operation, "xpu", torch.float32)
        assert served.function == f"{reference.__name__}.{operation}" and "no fast twin" in served.reason


def test_a_gpu_that_does_not_answer_is_a_failure(run, monkeypatch):
    def fail():
        raise RuntimeError("CUDA error: devices are busy\nor unavailable")

    monkeypatch.setattr(doctor, "gpus", fail)
    code, out, _ = run()
    assert code == 1 and "failed: RuntimeError: CUDA error: devices are busy or unavailable" in out


def test_driver_version(monkeypatch):
    texts = {
        "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build  (a@b)\nGCC 13.2.0": "580.65.06",
        "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug 19\n": "535.104.05",
        "something else": "unknown",
    }
    for text, version in texts.items():
        monkeypatch.setattr(doctor.Path, "read_text", lambda self, text=text, **_: text)
        assert doctor._driver() == version


def test_warnings(monkeypatch):
    cpu = {"threads": 8, "cores": 2, "memory_free": 5e8}
    slow = {"operation": "pool", "device": "cuda:0", "slower": True, "reason": "triton is not installed"}
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("CUDA_LAUNCH_BLOCKING", "1")
    monkeypatch.setattr(doctor, "_driver", lambda: "580.1")
    monkeypatch.setattr(doctor, "LOW_DISK", 1e30)
    said = "\n".join(doctor._warnings(cpu, [], [slow, slow], None))
    for words in (
        "8 threads on 2 usable cores", "OMP_NUM_THREADS=1 leaves 1 of 2", "CUDA_LAUNCH_BLOCKING", "torch sees no GPU",
        "NUMBA_CACHE_DIR", "GB are free in the temporary folder", "0.5 GB of memory", "pool on cuda is slow: triton is",
    ):  # fmt: skip
        assert said.count(words) == 1, words


def test_a_torch_that_cannot_be_imported_costs_one_sentence(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "recurlm.doctor", None)
    code, out, err = run()
    assert code == 1 and out == "" and err.startswith("recurlm: recurlm cannot start here") and err.count("\n") == 1


def test_through_the_shell_from_an_empty_folder(tmp_path):
    environment = {
        **doctor.os.environ,
        "NUMBA_CACHE_DIR": str(tmp_path / "cache"),
        "RECURLM_DATA": str(tmp_path / "data"),
    }
    done = subprocess.run(
        [sys.executable, "-m", "recurlm", "doctor", "--json"],
        capture_output=True,
        text=True,
        env=environment,
        cwd=tmp_path,
    )
    facts = json.loads(done.stdout)
    assert done.returncode == 0 and facts["data"] == {"folder": str(tmp_path / "data"), "present": []}
    assert facts["numba_cache"].startswith(str(tmp_path / "cache"))
