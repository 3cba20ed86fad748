"""A model as a folder: manifest.json, config.json, model.safetensors, tokenizer.json. No code, no pickle.

`read` opens only what the manifest lists and verifies every byte of it.
"""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from recurlm import files, tensors
from recurlm.config import ModelConfig, section_from_dict
from recurlm.errors import CheckpointError, ConfigError, UserError, shown
from recurlm.model.neural import NeuralModel
from recurlm.model.precision import Precision

FORMAT = 1
MANIFEST, CONFIG, WEIGHTS, TOKENIZER = "manifest.json", "config.json", "model.safetensors", "tokenizer.json"


def exists(folder: Path) -> bool:
    """Whether the folder holds a published model."""
    return (folder / MANIFEST).is_file()


def write(
    folder: Path, model: NeuralModel, weights: dict[str, Tensor], tokenizer_json: str, facts: dict[str, Any]
) -> None:
    """Publishes the weights as the folder's model; at every moment the folder holds the old model or the new.

    While the weights file is exchanged the manifest accepts both. `facts` (step, validation loss, ...) are kept
    in the manifest for people.
    """
    config = {
        "model_type": "recurlm",
        "kind": "neural",
        "vocab_size": model.vocab_size,
        "model": dataclasses.asdict(model.config),
    }
    listed = {}
    for name, content in ((CONFIG, files.to_json(config)), (TOKENIZER, tokenizer_json)):
        if not (folder / name).is_file() or (folder / name).read_bytes() != content.encode():
            files.write_atomic(folder / name, content)
        listed[name] = files.describe(folder / name)
    temporary = folder / f"{WEIGHTS}.tmp-{os.getpid()}"
    try:
        save_file({name: t.detach().contiguous() for name, t in weights.items()}, temporary, metadata={"format": "pt"})
        temporary.chmod(0o644)  # safetensors makes it private
        new = files.describe(temporary)
        if (folder / WEIGHTS).is_file():
            between = {**listed, WEIGHTS: files.describe(folder / WEIGHTS)}
            _write_manifest(folder, {"facts": facts, "files": between, "pending": new})
        files.publish(temporary, folder / WEIGHTS)
        _write_manifest(folder, {"facts": facts, "files": {**listed, WEIGHTS: new}})
    finally:
        temporary.unlink(missing_ok=True)


def _write_manifest(folder: Path, content: dict[str, Any]) -> None:
    files.write_manifest(folder / MANIFEST, {"format": FORMAT, "kind": "neural", **content})


def read(folder: Path, device: torch.device, how: Precision) -> tuple[NeuralModel, dict[str, Any]]:
    """(model, manifest) of the folder, every listed file verified; CheckpointError naming the file otherwise."""
    if not exists(folder):
        raise UserError(_no_model(folder))
    manifest = files.read_manifest(folder / MANIFEST, FORMAT)
    if "values" in manifest:
        raise UserError(f"{folder}: a checkpoint; give the run directory that it belongs to.")
    listed, pending = manifest["files"], manifest.get("pending")
    if manifest.get("kind") != "neural" or not isinstance(manifest.get("facts"), dict) or CONFIG not in listed:
        raise CheckpointError(f"{folder / MANIFEST}: not the manifest of a model.")
    for name in (CONFIG, TOKENIZER):
        if reason := files.fault(folder / name, listed.get(name)):
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
    weights = tensors.read(folder / WEIGHTS, listed.get(WEIGHTS), pending, expected=shapes)
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
