"""A model as a folder: manifest.json, config.json, model.safetensors, tokenizer.json. No code, no pickle.

`read` opens only what the manifest lists and verifies every byte of it.
"""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from recurlm import files
from recurlm.config import ModelConfig, section_from_dict
from recurlm.errors import CheckpointError, ConfigError, UserError
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
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; expected a run directory, as `recurlm train -o` makes it.")
    if not exists(folder):
        hint = " It has checkpoints only: let training reach a validation." if (folder / "checkpoints").is_dir() else ""
        raise UserError(f"{folder}: not a run directory, for it has no {MANIFEST}.{hint}")
    manifest = files.read_manifest(folder / MANIFEST, FORMAT)
    for name in (CONFIG, TOKENIZER, WEIGHTS):
        pending = manifest.get("pending") if name == WEIGHTS else None
        if reason := files.fault(folder / name, manifest["files"].get(name), pending):
            raise CheckpointError(f"{folder / name}: {reason}.")
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        settings: ModelConfig = section_from_dict("model", config["model"])
        vocab_size = config["vocab_size"]
        if type(vocab_size) is not int or not 1 <= vocab_size < 2**31:
            raise ConfigError(f"vocab_size = {vocab_size!r}: expected a positive whole number.")
    except (ValueError, KeyError, TypeError, RecursionError, ConfigError) as error:
        raise CheckpointError(f"{folder / CONFIG}: not a model's configuration ({error}).") from None
    return _with_weights(folder / WEIGHTS, settings, vocab_size, device, how), manifest


def _with_weights(
    path: Path, config: ModelConfig, vocab_size: int, device: torch.device, how: Precision
) -> NeuralModel:
    """The model with the file's weights; shapes are compared before anything of the model's size is allocated."""
    try:
        with torch.device("meta"):
            model = NeuralModel(config, vocab_size, torch.Generator("cpu"), how)
    except ConfigError as error:
        raise CheckpointError(f"{path.with_name(CONFIG)}: {error}") from None
    try:
        weights = load_file(path, device=str(device))
    except SafetensorError as error:
        raise CheckpointError(f"{path}: not a safetensors file ({error}).") from None
    expected = {name: tuple(p.shape) for name, p in model.named_parameters()}
    found = {name: tuple(t.shape) for name, t in weights.items()}
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            raise CheckpointError(f"{path}: {name} is {found.get(name)}, but {CONFIG} asks for {expected.get(name)}.")
    model.load_state_dict({name: t.float() for name, t in weights.items()}, assign=True)
    return model.requires_grad_(False).eval()
