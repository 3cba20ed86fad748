"""Files that survive a crash: atomic writes, hashes, locks. Knows nothing of models or text."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from recurlm.errors import CheckpointError, UserError


def sha256(path: Path) -> str:
    """The file's SHA-256 as hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Waits until the file's or folder's content is on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def publish(temporary: Path, path: Path) -> None:
    """Puts a finished file or folder in place: sync, rename, sync the parent folder."""
    sync(temporary)
    temporary.replace(path)
    sync(path.parent)


def write_atomic(path: Path, content: str | bytes) -> None:
    """Writes the file so that a crash leaves the old content or the new, never a part."""
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    try:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)
        publish(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def to_json(value: Any) -> str:
    """Strict JSON (no NaN), indented, with a final newline."""
    return json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def describe(path: Path) -> dict[str, Any]:
    """What a manifest says of a file: {size, sha256}."""
    return {"size": path.stat().st_size, "sha256": sha256(path)}


def fault(path: Path, *accepted: Any) -> str | None:
    """What is wrong with a file that must match one of the `accepted` descriptions; None when nothing is."""
    if not path.is_file():
        return "it is missing"
    size = path.stat().st_size
    known = [entry for entry in accepted if isinstance(entry, dict)]
    if size not in [entry.get("size") for entry in known]:
        return f"it is {size:,} bytes long, not as its manifest says"
    if sha256(path) not in [entry.get("sha256") for entry in known]:
        return "its checksum does not match its manifest; it is damaged or belongs to another model"
    return None


def _seal_of(manifest: dict[str, Any]) -> str:
    body = {key: value for key, value in manifest.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def write_manifest(path: Path, manifest: dict[str, Any]) -> None:
    """Writes the manifest with its own checksum, atomically."""
    write_atomic(path, to_json({**manifest, "sha256": _seal_of(manifest)}))


def read_manifest(path: Path, known_format: int) -> dict[str, Any]:
    """The manifest, its own checksum and format checked; CheckpointError naming the file otherwise."""
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not a readable manifest ({error}).") from None
    if not isinstance(manifest, dict) or manifest.get("sha256") != _seal_of(manifest):
        raise CheckpointError(f"{path}: its own checksum does not match; the file is damaged or was edited.")
    if manifest.get("format") != known_format:
        raise CheckpointError(f"{path}: format {manifest.get('format')!r}, but this recurlm reads {known_format}.")
    return manifest


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Holds the folder's `.lock`, which dies with the process; UserError when another process holds it."""
    with (folder / ".lock").open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"{folder} is in use by another recurlm process; wait for it or choose another -o."
            ) from None
        yield
