"""Tensor files from strangers: safetensors read with every promise of the header checked before memory is taken.

The bytes that are hashed are the bytes that become tensors, so nothing can change between the check and the use.
"""

from __future__ import annotations

import hashlib
import json
import math
import mmap
import os
from collections.abc import Mapping, Sequence
from io import BufferedReader
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from recurlm import files
from recurlm.errors import CheckpointError, shown

MAX_HEADER = 1 << 20
MAX_TENSORS = 4096
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "U16": torch.uint16, "U32": torch.uint32,
}  # fmt: skip


class Entry(NamedTuple):
    """One tensor as the header describes it; bytes `start` to `end` after the header are its values."""

    start: int
    end: int
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]


def read(
    path: Path, *accepted: Any, expected: Mapping[str, tuple[int, ...]] | None = None, most: int = MAX_TENSORS,
    dtypes: Sequence[torch.dtype] = (torch.float32,),
) -> dict[str, Tensor]:  # fmt: skip
    """The file's tensors on the CPU; CheckpointError naming the file when anything about it is wrong.

    The file must match one of the `accepted` descriptions of `files.describe`; with `expected` its names and shapes
    are exactly those, in one of `dtypes`. No more memory is taken than the file is long, and its header at most 1 MB.
    """
    try:
        with files.open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            known = [entry for entry in accepted if isinstance(entry, dict)]
            if size not in [entry.get("size") for entry in known]:
                raise ValueError(f"it is {size:,} bytes long, not as its manifest says")
            digest = hashlib.sha256()
            entries = _entries(file, size, digest, most)
            if expected is not None:
                _compare(entries, expected, dtypes)
            tensors = {entry.name: _tensor(file, entry, digest) for entry in entries}
    except FileNotFoundError:
        raise CheckpointError(f"{path}: it is missing.") from None
    except OSError as error:
        if error.errno not in files.NO_FILE:
            raise
        raise CheckpointError(f"{path}: it cannot be read ({error.strerror or error}).") from None
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}.") from None
    if digest.hexdigest() not in [entry.get("sha256") for entry in known]:
        raise CheckpointError(
            f"{path}: its checksum does not match its manifest; it is damaged or belongs to another model."
        )
    return tensors


def write_arrays(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """None; writes the arrays as a safetensors file, without a copy of them in memory.

    Those of wide types come first, so that all are aligned.
    """
    codes = {np.dtype(f"<{code[0].lower()}{int(code[1:]) // 8}"): code for code in DTYPES if code != "BF16"}
    order = sorted(arrays, key=lambda name: (-arrays[name].itemsize, name))
    header, end = {}, 0
    for name in order:
        start, end = end, end + arrays[name].nbytes
        header[name] = {"dtype": codes[arrays[name].dtype], "shape": arrays[name].shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            file.write(np.ascontiguousarray(arrays[name]).data)


def map_arrays(path: Path, accepted: Any, expected: Mapping[str, tuple[str, tuple[int, ...]]]) -> dict[str, np.ndarray]:
    """The file's arrays as read-only views of the file, which is read where they are used; errors as those of `read`.

    Names, types (numpy's) and shapes are exactly the `expected` ones. The checksum is that of the file when it was mapped:
    whoever writes into it later changes the arrays (recurlm puts new files in place of old ones and never does).
    """
    try:
        with files.open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            if not isinstance(accepted, dict) or size != accepted.get("size"):
                raise ValueError(f"it is {size:,} bytes long, not as its manifest says")
            digest = hashlib.sha256()
            entries = {entry.name: entry for entry in _entries(file, size, digest, MAX_TENSORS)}
            base = file.tell()
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: it is missing.") from None
    except OSError as error:
        if error.errno not in files.NO_FILE:
            raise
        raise CheckpointError(f"{path}: it cannot be read ({error.strerror or error}).") from None
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}.") from None
    digest.update(memoryview(mapped)[base:])
    if digest.hexdigest() != accepted.get("sha256"):
        raise CheckpointError(
            f"{path}: its checksum does not match its manifest; it is damaged or belongs to another model."
        )
    out = {}
    for name in sorted(expected.keys() | entries.keys()):
        wanted, entry = expected.get(name), entries.get(name)
        found = entry and (str(torch.empty(0, dtype=entry.dtype).numpy().dtype), entry.shape)
        if wanted is None or entry is None or found != wanted or (base + entry.start) % np.dtype(wanted[0]).itemsize:
            raise CheckpointError(f"{path}: {shown(name)} is {found}, but config.json asks for {wanted}.")
        out[name] = np.frombuffer(mapped, wanted[0], math.prod(wanted[1]), base + entry.start).reshape(wanted[1])
    return out


def _entries(file: BufferedReader, size: int, digest: Any, most: int) -> list[Entry]:
    """The header's entries in the order of their bytes, which they cover without a hole; ValueError otherwise.

    Format: 8 bytes with the header's length (little endian), the header as JSON, the values (safetensors' README).
    """
    head = file.read(8)
    length = int.from_bytes(head, "little")
    if len(head) < 8 or not 2 <= length <= min(MAX_HEADER, size - 8):
        raise ValueError(f"not a safetensors file of ours (a header of {length:,} bytes)")
    text = file.read(length)
    digest.update(head + text)
    try:
        header = files.parse_json(text)
    except ValueError as error:
        raise ValueError(f"not a safetensors file (its header is not JSON: {error})") from None
    if not isinstance(header, dict) or len(header) > most + 1:
        raise ValueError(f"not a safetensors file of ours (its header is no table of at most {most:,} tensors)")
    entries = sorted(_entry(name, value) for name, value in header.items() if name != "__metadata__")
    ends = [0, *(entry.end for entry in entries)]
    if [entry.start for entry in entries] != ends[:-1] or ends[-1] != size - 8 - length:
        raise ValueError("not a safetensors file (its tensors overlap, leave holes or do not fill it)")
    return entries


def _entry(name: str, value: Any) -> Entry:
    place = f"not a safetensors file (the entry {shown(name)} of its header"
    if not isinstance(value, dict) or value.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{place} is not dtype, shape and data_offsets)")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ValueError(f"{place} has the dtype {shown(dtype)})")
    if not (_counts(shape, 8) and _counts(offsets, 2) and len(offsets) == 2):
        raise ValueError(f"{place} has an impossible shape or place)")
    if math.prod(shape) * DTYPES[dtype].itemsize != offsets[1] - offsets[0]:
        raise ValueError(f"{place} has another length than its shape)")
    return Entry(offsets[0], offsets[1], name, DTYPES[dtype], tuple(shape))


def _counts(values: Any, most: int) -> bool:
    """Whether that is a short list of whole numbers which a file could have."""
    return isinstance(values, list) and len(values) <= most and all(type(v) is int and 0 <= v < 2**63 for v in values)


def _compare(entries: list[Entry], expected: Mapping[str, tuple[int, ...]], dtypes: Sequence[torch.dtype]) -> None:
    found = {entry.name: entry for entry in entries}
    for name in sorted(expected.keys() | found.keys()):
        shape = found[name].shape if name in found else None
        if shape != expected.get(name):
            raise ValueError(f"{shown(name)} is {shape}, but config.json asks for {expected.get(name)}")
        if found[name].dtype not in dtypes:
            raise ValueError(f"{shown(name)} is {found[name].dtype}, expected {' or '.join(map(str, dtypes))}")


def _tensor(file: BufferedReader, entry: Entry, digest: Any) -> Tensor:
    """The entry's values, read into memory of their own."""
    out = torch.empty(entry.shape, dtype=entry.dtype)
    view = out.view(-1).view(torch.uint8).numpy().data
    if file.readinto(view) != len(view):
        raise ValueError("it became shorter while it was read")
    digest.update(view)
    return out
