"""A model as a folder: manifest.json, config.json, model.safetensors, tokenizer.json. No code, no pickle.

`read` opens only what the manifest lists and verifies every byte of it. An exported model may have its weights in bf16, and
in several files with an index, as Hugging Face's libraries lay them out.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
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
INDEX, SHARD = "model.safetensors.index.json", r"model-[0-9]{5}-of-[0-9]{5}\.safetensors"
ROWS = re.compile(r"(.+)\[([0-9]{1,9}):([0-9]{1,9})\]")  # some rows of a weight that is larger than a file may be
STORED = {"fp32": torch.float32, "bf16": torch.bfloat16}


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
    texts = {CONFIG: _config_json(model), TOKENIZER: tokenizer_json}
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


def _config_json(model: NeuralModel) -> str:
    return files.to_json(
        {
            "model_type": "recurlm",
            "kind": "neural",
            "vocab_size": model.vocab_size,
            "model": dataclasses.asdict(model.config),
        }
    )


def export(
    folder: Path, model: NeuralModel, tokenizer_json: str, facts: dict[str, Any], dtype: str, most_bytes: int
) -> None:
    """Writes the model into a folder that is there and empty, its weights in `dtype`, in files of `most_bytes` at most.

    Fits one file: model.safetensors. Else model-00001-of-0000N.safetensors, ... and an index of which weight is where. A
    weight larger than a file may be is divided by rows, its parts named weight[first:last]; ConfigError when a row is larger.
    """
    weights = {name: p.detach().to("cpu", STORED[dtype]).contiguous() for name, p in model.named_parameters()}
    shards = _shards(weights, most_bytes)
    names = [f"model-{n:05}-of-{len(shards):05}.safetensors" for n in range(1, 1 + len(shards))]
    texts = {CONFIG: _config_json(model), TOKENIZER: tokenizer_json}
    if len(shards) == 1:
        names = [WEIGHTS]
    else:
        places = {name: file for file, shard in zip(names, shards, strict=True) for name in shard}
        total = sum(t.nbytes for t in weights.values())
        texts[INDEX] = files.to_json({"metadata": {"total_size": total}, "weight_map": places})
    files.check_space(folder, sum(t.nbytes for t in weights.values()) + sum(map(len, texts.values())) + (1 << 16))
    for name, shard in zip(names, shards, strict=True):
        save_file(shard, folder / name, metadata={"format": "pt"})
        (folder / name).chmod(0o644)  # safetensors makes it private
        files.sync(folder / name)
    for name, text in texts.items():
        files.write_atomic(folder / name, text)
    _write_manifest(
        folder, {"facts": facts | {"dtype": dtype}, "files": {n: files.describe(folder / n) for n in (*texts, *names)}}
    )


def _shards(weights: dict[str, Tensor], most_bytes: int) -> list[dict[str, Tensor]]:
    """The weights in their order, parted so that no file is longer than `most_bytes`."""
    shards: list[dict[str, Tensor]] = []
    room = 0
    for name, tensor in (part for weight in weights.items() for part in _parts(*weight, most_bytes)):
        needed = _needed(name, tensor)
        if not shards or needed > room:
            shards.append({})
            room = most_bytes - 200
        shards[-1][name] = tensor
        room -= needed
    return shards


def _needed(name: str, tensor: Tensor) -> int:
    return tensor.nbytes + len(name.encode()) + 200  # its line in the header, and its share of what is around it


def _parts(name: str, tensor: Tensor, most_bytes: int) -> list[tuple[str, Tensor]]:
    """The weight, or as few and equal runs of its rows as fit files of `most_bytes`."""
    if _needed(name, tensor) <= most_bytes - 200:
        return [(name, tensor)]
    around = _needed(f"{name}[{len(tensor)}:{len(tensor)}]", tensor[:1])
    most = (most_bytes - 200 - around) // tensor[0].nbytes + 1
    if most < 1:
        raise ConfigError(
            f"One row of the weight {name} takes {around + 200:,} bytes in {str(tensor.dtype).removeprefix('torch.')}, "
            f"but a file may have {most_bytes:,}; allow larger files."
        )
    rows = -(-len(tensor) // -(-len(tensor) // most))
    return [
        (f"{name}[{t}:{t + len(p)}]", p) for t, p in zip(range(0, len(tensor), rows), tensor.split(rows), strict=True)
    ]


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
    weights: dict[str, Tensor] = {}
    for file, expected in _places(folder, listed, shapes).items():
        known = listed.get(file), pending.get(file)
        part = tensors.read(folder / file, *known, expected=expected, dtypes=tuple(STORED.values()))
        for name, tensor in part.items():
            if not bool(torch.isfinite(tensor).all()):
                raise CheckpointError(f"{folder / file}: {name} holds a number that is not finite.")
            weights[name] = tensor.to(device, torch.float32)
    for name in shapes.keys() - weights.keys():
        weights[name] = torch.cat([weights.pop(part) for part in sorted(weights, key=_rows) if _rows(part)[0] == name])
    model.load_state_dict(weights, assign=True)
    return model.requires_grad_(False).eval(), manifest


def _rows(name: str) -> tuple[str, int, int]:
    """(weight, first row, last row + 1) that the name of a part of a weight means; (name, 0, 0) for a whole weight."""
    match = ROWS.fullmatch(name)
    return (match[1], int(match[2]), int(match[3])) if match else (name, 0, 0)


def _shapes_of_parts(names: list[str], shapes: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Each name's shape, weights and parts of them; ValueError unless every weight is there once, whole or in its parts."""
    out, done = {}, dict.fromkeys(shapes, 0)
    for name, first, last in sorted(map(_rows, names)):
        rows = shapes.get(name, (0,))[0]
        whole = last == 0
        if name not in done or done[name] != first or not (whole or first < last <= rows):
            raise ValueError("it does not say where each of the model's weights is")
        done[name] = rows if whole else last
        out[name if whole else f"{name}[{first}:{last}]"] = shapes[name] if whole else (last - first, *shapes[name][1:])
    if out.keys() != set(names) or any(done[name] != shape[0] for name, shape in shapes.items()):
        raise ValueError("it does not say where each of the model's weights is")
    return out


def _places(
    folder: Path, listed: dict[str, Any], shapes: dict[str, tuple[int, ...]]
) -> dict[str, dict[str, tuple[int, ...]]]:
    """The names and shapes that each file has to hold, as the index says where there is one; CheckpointError when it
    cannot be right."""
    if INDEX not in listed:
        return {WEIGHTS: shapes}
    if reason := files.fault(folder / INDEX, listed[INDEX]):
        raise CheckpointError(f"{folder / INDEX}: {reason}.")
    try:
        index = files.parse_json(files.read_regular(folder / INDEX, 1 << 20))
        places = index["weight_map"] if isinstance(index, dict) else None
        if not isinstance(places, dict):
            raise ValueError("it does not say where each of the model's weights is")
        parts = _shapes_of_parts(list(places), shapes)
        shards = {file for file in places.values() if isinstance(file, str) and re.fullmatch(SHARD, file)}
        if not all(isinstance(file, str) and file in shards and file in listed for file in places.values()):
            raise ValueError("it names a file that is none of the model's")
    except (OSError, KeyError, ValueError) as error:
        raise CheckpointError(f"{folder / INDEX}: not an index of weights ({error}).") from None
    return {file: {name: shape for name, shape in parts.items() if places[name] == file} for file in sorted(shards)}


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
