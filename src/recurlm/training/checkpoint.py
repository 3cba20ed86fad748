"""Checkpoints that a crash cannot break: tensors and plain values in, the same out, every byte verified.

step-N.tmp-PID/ -> tensors.safetensors, synced -> manifest.json last -> rename to step-N -> sync the parent.
`newest` takes the newest valid one and says why it skipped another. Nothing is changed in place; what is in the
folder and not ours is left as it is.
"""

from __future__ import annotations

import contextlib
import os
import re
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from recurlm import files
from recurlm.errors import CheckpointError, RunError
from recurlm.tensors import read

FORMAT = 1
TENSORS = "tensors.safetensors"
MANIFEST = "manifest.json"
MOST_MANIFEST = 64 << 20  # bytes: it lists every validation
MAX_TENSORS = 1 << 14  # a model's 4,096 at most, with their moments and means


class Checkpoint(NamedTuple):
    """What was saved at `step`."""

    step: int
    tensors: dict[str, Tensor]
    values: dict[str, Any]


STEP = r"step-(0|[1-9][0-9]{0,11})"


def _is_step(path: Path) -> bool:
    return re.fullmatch(STEP, path.name) is not None and path.is_dir() and not path.is_symlink()


def steps(folder: Path) -> list[Path]:
    """The checkpoints in `folder`, newest first; foreign entries are left out."""
    found = [path for path in folder.iterdir() if _is_step(path)] if folder.is_dir() else []
    return sorted(found, key=lambda path: int(path.name[5:]), reverse=True)


def clean(folder: Path) -> None:
    """Removes what a dead writer or pruner left behind. Call it only while holding the run's lock."""
    for path in folder.iterdir() if folder.is_dir() else ():
        if re.fullmatch(rf"{STEP}\.old-[0-9]+", path.name) and not path.is_symlink():  # it was being replaced
            final = path.with_name(path.name.partition(".")[0])
            _dispose(path) if os.path.lexists(final) else path.rename(final)
    files.clean(folder, STEP)


def save(folder: Path, step: int, tensors: dict[str, Tensor], values: dict[str, Any], keep: int) -> None:
    """Writes a checkpoint, then prunes to the `keep` newest; the new one is never pruned.

    RunError when the disk is full or refuses; earlier checkpoints are intact then.
    """
    final, temporary, old = (folder / f"step-{step}{end}" for end in ("", f".tmp-{os.getpid()}", f".old-{os.getpid()}"))
    needed = sum(t.numel() * t.element_size() for t in tensors.values()) + (1 << 16)
    try:
        files.make_folder(folder)
        files.check_space(folder, needed)
        temporary.mkdir()
        save_file({name: t.detach().contiguous() for name, t in tensors.items()}, temporary / TENSORS)
        files.sync(temporary / TENSORS)
        files.write_manifest(
            temporary / MANIFEST,
            {
                "format": FORMAT,
                "step": step,
                "values": values,
                "files": {TENSORS: files.describe(temporary / TENSORS)},
            },
        )
        if os.path.lexists(final):  # the same step saved again, or something in the way
            final.rename(old)
        files.publish(temporary, final)
    except (OSError, SafetensorError) as error:
        with contextlib.suppress(OSError):
            if os.path.lexists(old) and not os.path.lexists(final):
                old.rename(final)
        raise RunError(
            f"{final}: the checkpoint could not be saved ({files.reason(error, folder, needed)}); earlier checkpoints "
            "are intact. Free some space or fix the folder, then go on with --resume auto."
        ) from error
    finally:
        files.remove(temporary)
    with contextlib.suppress(OSError):  # the next save tries again
        if os.path.lexists(old):
            _dispose(old)
        prune(folder, final, keep)


def _is_ours(path: Path) -> bool:
    """Whether the folder was written by `save`; its tensors are not looked at."""
    if path.is_symlink():
        return False
    try:
        files.read_manifest(path / MANIFEST, FORMAT, MOST_MANIFEST)
        return True
    except CheckpointError:
        return False


def _dispose(old: Path) -> None:
    """Deletes a checkpoint that was replaced; anything else is kept under another name."""
    if _is_ours(old):
        files.remove(old)
    else:
        _put_aside(old, old.name.partition(".")[0])


def _put_aside(path: Path, name: str) -> None:
    number = 0
    while os.path.lexists(aside := path.with_name(f"unusable-{name}-{number}")):
        number += 1
    path.rename(aside)


def prune(folder: Path, newest: Path, keep: int) -> None:
    """Deletes all but the `keep` newest checkpoints, `newest` counted and never deleted; foreign folders stay."""
    for path in [path for path in steps(folder) if path != newest and _is_ours(path)][keep - 1 :]:
        trash = path.with_name(f"{path.name}.trash-{os.getpid()}")
        path.rename(trash)
        files.remove(trash)


def load(path: Path) -> Checkpoint:
    """The checkpoint at `path`, verified; CheckpointError naming file and fault otherwise."""
    manifest = files.read_manifest(path / MANIFEST, FORMAT, MOST_MANIFEST)
    step, values = manifest.get("step"), manifest.get("values")
    if type(step) is not int or not isinstance(values, dict):
        raise CheckpointError(f"{path / MANIFEST}: not the manifest of a checkpoint.")
    if path.name != f"step-{step}":
        raise CheckpointError(f"{path}: the folder's name and its manifest's step {step} differ.")
    return Checkpoint(step, read(path / TENSORS, manifest["files"].get(TENSORS), most=MAX_TENSORS), values)


def newest(folder: Path) -> tuple[Checkpoint | None, list[str]]:
    """(newest valid checkpoint or None, why newer ones were skipped)."""
    skipped: list[str] = []
    for path in steps(folder):
        try:
            return load(path), skipped
        except CheckpointError as error:
            skipped.append(str(error))
    return None, skipped


def set_aside(folder: Path, step: int) -> None:
    """Renames checkpoints newer than `step`, which could not be used, so that they count no longer as checkpoints."""
    for path in steps(folder):
        if int(path.name[5:]) > step:
            _put_aside(path, path.name)


def flatten_optimizer(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimiser's tensors by 'INDEX.NAME', in the order of the parameters."""
    state = optimizer.state_dict()["state"]
    return {f"{i}.{name}": value for i, entry in state.items() for name, value in entry.items() if value is not None}


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Puts tensors of `flatten_optimizer` back. Their shapes must be right: a fused optimiser trusts them."""
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        index, name = key.split(".", 1)
        state.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
