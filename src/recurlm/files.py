"""Files that survive a crash: atomic writes, hashes, locks. Knows nothing of models or text."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
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


def make_folder(path: Path) -> list[Path]:
    """The folders that were made for `path` to exist, the deepest first; they survive a power loss."""
    made = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for folder in made:
        with contextlib.suppress(PermissionError):  # a parent that may be entered but not listed
            sync(folder.parent)
    return made


def remove(path: Path) -> None:
    """Removes a file or folder of our own making; what cannot be removed now is removed at the next start."""
    with contextlib.suppress(OSError):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def clean(folder: Path, names: str) -> None:
    """Removes what dead writers left of the `names` (a pattern): NAME.tmp-PID, NAME.trash-PID. Call it under the lock.

    Links are left alone: recurlm makes none.
    """
    for path in folder.iterdir() if folder.is_dir() else ():
        if re.fullmatch(rf"({names})\.(tmp|trash)-[0-9]+(-old)?", path.name) and not path.is_symlink():
            remove(path)


def space(folder: Path, needed: int) -> str:
    """How much is needed and free, for a message."""
    return f"{needed:,} bytes are needed, {shutil.disk_usage(folder).free:,} are free"


def reason(error: Exception, folder: Path, needed: int) -> str:
    """Why something of `needed` bytes could not be written to `folder`."""
    with contextlib.suppress(OSError):
        return f"{error}; {space(folder, needed)}"
    return str(error)


def check_space(folder: Path, needed: int) -> None:
    """OSError when the disk has less than `needed` bytes free."""
    if shutil.disk_usage(folder).free < needed:
        raise OSError(errno.ENOSPC, "No space left on device", str(folder))


def publish(temporary: Path, path: Path) -> None:
    """Puts a finished file or folder in place: sync, rename, sync the parent folder."""
    sync(temporary)
    temporary.replace(path)
    sync(path.parent)


def write_atomic(path: Path, content: str | bytes) -> None:
    """Writes the file so that a crash leaves the old content or the new, never a part; OSError naming the file."""
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    data = content.encode() if isinstance(content, str) else content
    try:
        temporary.write_bytes(data)
        publish(temporary, path)
    except OSError as error:
        more = f" ({space(path.parent, len(data))})" if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
        raise OSError(error.errno, f"{error.strerror}{more}", str(path)) from error
    finally:
        remove(temporary)


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
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not a readable manifest ({error}).") from None
    if not isinstance(manifest, dict) or manifest.get("sha256") != _seal_of(manifest):
        raise CheckpointError(f"{path}: its own checksum does not match; the file is damaged or was edited.")
    if manifest.get("format") != known_format:
        raise CheckpointError(f"{path}: format {manifest.get('format')!r}, but this recurlm reads {known_format}.")
    return manifest


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Makes the folder and holds its `.lock`, which dies with the process; UserError when another process holds it.

    Folders that were made here and hold nothing in the end are removed again.
    """
    lock = folder / ".lock"
    try:
        made = make_folder(folder)
    except OSError as error:
        raise UserError(f"{folder}: cannot be made the run directory: {error.strerror}.") from None
    with lock.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not os.path.samestat(os.fstat(file.fileno()), lock.stat()):  # removed since it was opened
                raise BlockingIOError
        except (BlockingIOError, FileNotFoundError):
            raise UserError(
                f"{folder} is in use by another recurlm process; wait for it or choose another -o."
            ) from None
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                if [path.name for path in folder.iterdir()] == [lock.name]:
                    lock.unlink()
                    for path in made:
                        path.rmdir()
