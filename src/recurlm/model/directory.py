"""A model as a folder: manifest.json, config.json, model.safetensors, tokenizer.json. No code, no pickle.

`read` opens only what the manifest lists and verifies every byte of it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from recurlm import files, tensors
from recurlm.config import ModelConfig, section_from_dict
from recurlm.errors import CheckpointError, ConfigError, RunError, UserError, shown
from recurlm.model.neural import NeuralModel
from recurlm.model.precision import Precision

FORMAT = 1
MANIFEST, CONFIG, WEIGHTS, TOKENIZER = "manifest.json", "config.json", "model.safetensors", "tokenizer.json"
FILES = (CONFIG, TOKENIZER, WEIGHTS)


def exists(folder: Path) -> bool:
    """Whether the folder holds a published model."""
    return (folder / MANIFEST).is_file()


def kind(folder: Path) -> str:
    """What the folder's model is: neural, ngram; UserError when it holds none, CheckpointError for a damaged manifest."""
    if not exists(folder):
        raise UserError(_no_model(folder))
    return str(files.read_manifest(folder / MANIFEST, FORMAT).get("kind"))


def write(
    folder: Path, model: NeuralModel, weights: dict[str, Tensor], tokenizer_json: str, facts: dict[str, Any]
) -> None:
    """Publishes the weights as the folder's model; at every moment the folder holds the old model or the new.

    While files are exchanged the manifest accepts the old ones and the new. `facts` (step, validation loss, ...) are
    kept in the manifest for people. RunError when the disk is full or refuses; the old model is intact then.
    """
    config = {
        "model_type": "recurlm",
        "kind": "neural",
        "vocab_size": model.vocab_size,
        "model": dataclasses.asdict(model.config),
    }
    texts = {CONFIG: files.to_json(config), TOKENIZER: tokenizer_json}
    needed = sum(t.numel() * t.element_size() for t in weights.values()) + sum(map(len, texts.values())) + (1 << 16)
    temporary = folder / f"{WEIGHTS}.tmp-{os.getpid()}"  # a folder, for safetensors makes a file of its own beside
    try:
        files.check_space(folder, needed)
        temporary.mkdir()
        tensors = {name: t.detach().contiguous() for name, t in weights.items()}
        save_file(tensors, temporary / WEIGHTS, metadata={"format": "pt"})
        (temporary / WEIGHTS).chmod(0o644)  # safetensors makes it private
        for name, text in texts.items():
            (temporary / name).write_text(text, encoding="utf-8")
        new = {name: files.describe(temporary / name) for name in FILES}
        with contextlib.suppress(
            CheckpointError, UserError
        ):  # no sound model is there: nothing to keep loadable meanwhile
            there = _verified(folder).get("facts", {})
            old = {name: files.describe(folder / name) for name in FILES}
            _write_manifest(folder, {"facts": there, "files": old, "pending": new, "pending_facts": facts})
        for name in FILES:
            files.publish(temporary / name, folder / name)
        _write_manifest(folder, {"facts": facts, "files": new})
    except (OSError, SafetensorError) as error:
        raise RunError(
            f"{folder}: the model could not be saved ({files.reason(error, folder, needed)}); what was there is intact. "
            "Free some space or fix the folder, then go on with --resume auto."
        ) from error
    finally:
        files.remove(temporary)


def _write_manifest(folder: Path, content: dict[str, Any]) -> None:
    files.write_manifest(folder / MANIFEST, {"format": FORMAT, "kind": "neural", **content})


def _manifest(folder: Path) -> dict[str, Any]:
    """The folder's manifest; while files are exchanged, its facts are those of the weights that are there."""
    manifest = files.read_manifest(folder / MANIFEST, FORMAT)
    if "values" in manifest:
        raise UserError(f"{folder}: a checkpoint; give the run directory that it belongs to.")
    listed, pending = manifest["files"], manifest.get("pending", {})
    if manifest.get("kind") != "neural" or not isinstance(pending, dict) or CONFIG not in listed:
        raise CheckpointError(f"{folder / MANIFEST}: not the manifest of a model.")
    if pending and files.fault(folder / WEIGHTS, listed.get(WEIGHTS)):
        manifest["facts"] = manifest.get("pending_facts")
    if not isinstance(manifest.get("facts"), dict):
        raise CheckpointError(f"{folder / MANIFEST}: not the manifest of a model.")
    return manifest


def _verified(folder: Path) -> dict[str, Any]:
    """The manifest, every file found to be as it says, old or new."""
    manifest = _manifest(folder)
    for name in FILES:
        if reason := files.fault(folder / name, manifest["files"].get(name), manifest.get("pending", {}).get(name)):
            raise CheckpointError(f"{folder / name}: {reason}.")
    return manifest


def read(folder: Path, device: torch.device, how: Precision) -> tuple[NeuralModel, dict[str, Any]]:
    """(model, manifest) of the folder, every listed file verified; CheckpointError naming the file otherwise."""
    if not exists(folder):
        raise UserError(_no_model(folder))
    for _ in range(100):  # a trainer may be exchanging the files just now
        before = _stamps(folder)
        try:
            out = _read(folder, device, how)
        except (CheckpointError, FileNotFoundError):
            if _stamps(folder) == before:
                raise
        else:
            if _stamps(folder) == before:
                return out
    raise CheckpointError(f"{folder}: its files are exchanged faster than they can be read.")


def _stamps(folder: Path) -> list[tuple[int, int] | None]:
    """What changes when one of the model's files is replaced."""
    stats = [(folder / name).stat() if (folder / name).exists() else None for name in (MANIFEST, *FILES)]
    return [s and (s.st_ino, s.st_mtime_ns) for s in stats]


def _read(folder: Path, device: torch.device, how: Precision) -> tuple[NeuralModel, dict[str, Any]]:
    manifest = _manifest(folder)
    listed, pending = manifest["files"], manifest.get("pending", {})
    for name in (CONFIG, TOKENIZER):
        if reason := files.fault(folder / name, listed.get(name), pending.get(name)):
            raise CheckpointError(f"{folder / name}: {reason}.")
    try:
        config = files.parse_json(files.read_regular(folder / CONFIG, 1 << 20))
        settings: ModelConfig = section_from_dict("model", config["model"])
        vocab_size = config["vocab_size"]
        if type(vocab_size) is not int or not 1 <= vocab_size < 2**31:
            raise ConfigError(f"vocab_size = {shown(vocab_size)}: expected a positive whole number.")
        with torch.device("meta"):  # nothing of the model's size is allocated before the weights are known to fit
            model = NeuralModel(settings, vocab_size, torch.Generator("cpu"), how)
    except (OSError, ValueError, KeyError, TypeError, ConfigError) as error:
        raise CheckpointError(f"{folder / CONFIG}: not a model's configuration ({error}).") from None
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    weights = tensors.read(folder / WEIGHTS, listed.get(WEIGHTS), pending.get(WEIGHTS), expected=shapes)
    for name, tensor in weights.items():
        if not bool(torch.isfinite(tensor).all()):
            raise CheckpointError(f"{folder / WEIGHTS}: {name} holds a number that is not finite.")
    model.load_state_dict({name: tensor.to(device) for name, tensor in weights.items()}, assign=True)
    return model.requires_grad_(False).eval(), manifest


def _no_model(folder: Path) -> str:
    """What to say of a path that holds no published model: the nearest guess at what it is instead."""
    if not folder.exists():
        return f"{folder}: no such folder; expected a run directory, as `recurlm train -o` makes it."
    if not folder.is_dir():
        return f"{folder}: a file; expected a run directory, as `recurlm train -o` makes it."
    hint = ""
    if (folder / "checkpoints").is_dir():
        hint = " It has checkpoints only: let training reach a validation."
    elif (folder / "store.json").is_file():
        hint = " It is a store of tokens: train on it with `recurlm train --data`."
    elif folder.name == "checkpoints" and exists(folder.parent):
        hint = f" Give the run directory itself, {folder.parent}."
    return f"{folder}: not a run directory, for it has no {MANIFEST}.{hint}"
