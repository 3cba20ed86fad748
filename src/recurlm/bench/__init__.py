"""Measurements of speed, each beside a peer and a limit of the hardware taken in the same run.

A measurement is one file with a function `rows() -> list[dict]` (the keys of `timing.Row.as_dict`) and one line here.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from datetime import datetime
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import torch

from recurlm import doctor, files
from recurlm.bench import (
    cross_entropy,
    hardware,
    heads,
    inference,
    lstm,
    mixture,
    pooling,
    pooling_cpu,
    startup,
    step,
    step_kernels,
    update,
)  # fmt: skip
from recurlm.errors import ConfigError, RunError, UserError, lookup
from recurlm.kernels import nvrtc
from recurlm.provenance import command, commit

Rows = list[dict[str, Any]]
KEYS = ("measure", "shape", "ours_us", "peer_us", "peer", "limit_us", "share", "target")


def anywhere() -> str:
    """Nothing is missing."""
    return ""


def gpu() -> str:
    """What a measurement on the GPU lacks here."""
    return "" if torch.cuda.is_available() else "it needs a CUDA GPU, and torch sees none here"


def gpu_with_triton() -> str:
    """What a measurement of a Triton kernel lacks here."""
    return gpu() or ("" if doctor.versions()["triton"] else "it needs triton, which is not installed")


def gpu_with_nvrtc() -> str:
    """What a measurement of a kernel in CUDA C++ lacks here."""
    return gpu() or nvrtc.missing()


class Measurement(NamedTuple):
    """What is measured, the function that does it, and what it lacks on this machine ("" for nothing)."""

    what: str
    rows: Callable[[], Rows]
    lacks: Callable[[], str] = anywhere


MEASUREMENTS: dict[str, Measurement] = {
    "hardware": Measurement("copy bandwidth and rate of matrix products: what limits are made of", hardware.rows),
    "startup": Measurement("recurlm --help beside import torch", startup.rows),
    "inference": Measurement("scoring and generating on the CPU beside plain torch", inference.rows),
    "pooling-cpu": Measurement("QRNN pooling on the CPU beside a copy and a plain loop", pooling_cpu.rows),
    "step": Measurement(
        "the training step of published models beside the same step not captured", step.rows, gpu_with_triton
    ),
    "lstm": Measurement("LSTM layers with resident weights beside cuDNN's", lstm.rows, gpu_with_nvrtc),
    "pooling": Measurement("QRNN pooling beside a plain loop over the columns", pooling.rows, gpu_with_triton),
    "cross-entropy": Measurement(
        "time and memory of the linear cross-entropy beside torch's", cross_entropy.rows, gpu_with_triton
    ),
    "heads": Measurement("every output layer at three vocabularies beside torch's", heads.rows),
    "mixture": Measurement("the loss of a mixture of softmaxes beside torch's", mixture.rows, gpu_with_triton),
    "step-kernels": Measurement(
        "activation penalties and the embedding's gradient beside torch's", step_kernels.rows, gpu_with_triton
    ),
    "update": Measurement("one update of all weights beside torch, locked dropout", update.rows, gpu_with_triton),
}


def listing(names: Sequence[str] = ()) -> Rows:
    """For each of the named measurements (none: all) its name, what it measures and what it lacks here.

    ConfigError for a name that is not known.
    """
    known = {name: lookup(MEASUREMENTS, name, "measurement") for name in names or MEASUREMENTS}
    return [{"name": name, "what": it.what, "lacks": it.lacks()} for name, it in known.items()]


def run(
    names: Sequence[str] = (),
    *,
    out: str | Path | None = None,
    begin: Callable[[str], object] = lambda name: None,
    show: Callable[[str, Rows, str], object] = lambda name, rows, why: None,
) -> dict[str, Any]:
    """The record of the named measurements, or without names of all that this machine can run.

    Keys: recurlm, commit, date, command, machine, results {name: rows}, skipped {name: why}, failed {name: why}. With
    `out` it is also the file bench-DATE.json in that folder, written anew after each measurement. `begin(name)` is
    called before each that can run, `show(name, rows, why)` after each: no rows and the reason where it was skipped or
    failed. ConfigError for a name that is not known, or that cannot run here.
    """
    wanted = listing(names)
    if names and (lacking := [f"{it['name']}: {it['lacks']}" for it in wanted if it["lacks"]]):
        raise ConfigError(f"Cannot be measured here: {'; '.join(lacking)}.")
    record = {**_circumstances(), "results": {}, "skipped": {}, "failed": {}}
    path = None if out is None else _new_file(Path(out), record)
    for it in wanted:
        name, why, kind = it["name"], it["lacks"], "skipped"
        rows: Rows = []
        if not why:
            begin(name)
            try:
                rows = record["results"][name] = _checked(MEASUREMENTS[name].rows())
            except Exception as error:  # the measurements after it, and those before it, are worth having
                kind, why = "failed", str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        if why:
            record[kind][name] = why = " ".join(why.split())
        show(name, rows, f"{kind}: {why}" if why else "")
        if path is not None:
            files.write_atomic(path, files.to_json(record))
    return record | ({} if path is None else {"file": str(path)})


def _checked(rows: Rows) -> Rows:
    """The rows; RunError for one that lacks a key, ValueError for a number that is not finite."""
    files.to_json(rows)
    for row in rows:
        if lacking := [key for key in KEYS if key not in row]:
            raise RunError(f"a row has no {', '.join(lacking)}")
    return rows


def _new_file(folder: Path, record: dict[str, Any]) -> Path:
    """A new bench-DATE.json with the record in the folder, which is made where it is not there."""
    stem = "bench-" + re.sub(r"\D", "", record["date"][:19])
    names = (f"{stem}{f'-{n}' if n > 1 else ''}.json" for n in count(1))
    try:
        files.make_folder(folder)
        path = next(path for name in names if not (path := folder / name).exists())
        files.write_atomic(path, files.to_json(record))
    except OSError as error:
        raise ConfigError(f"{folder}: cannot keep results there: {error.strerror}.") from None
    return path


def _circumstances() -> dict[str, Any]:
    versions, cpu = doctor.versions(), doctor.cpu()
    machine = {
        "cpu": cpu["name"], "cores": cpu["cores"], "threads": cpu["threads"],
        "gpus": [{key: gpu[key] for key in ("name", "capability", "driver", "cuda", "cudnn")} for gpu in doctor.gpus()],
    }  # fmt: skip
    return {
        "recurlm": versions.pop("recurlm"),
        "commit": commit(),
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
        "command": command(),
        "machine": machine | versions,
    }
