"""Files that survive a crash: atomic writes, hashes, locks. Knows nothing of models or text."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import math
import os
import re
import shutil
import stat
from collections.abc import Iterator
from io import BufferedReader
from pathlib import Path
from typing import Any

from recurlm.errors import CheckpointError, UserError, shown

LOCK = ".lock"
# Errors that tell what a path is, not that the disk fails: a file that is missing, no file, or a link that leads astray.
NO_FILE = (errno.ENOENT, errno.EISDIR, errno.ENOTDIR, errno.EINVAL, errno.EPERM, errno.ELOOP, errno.ENXIO)


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


def size(number: int) -> str:
    """So many bytes as people say it: '834 bytes', '90.18 MB', '1.5 GB'."""
    for unit, name in ((10**12, "TB"), (10**9, "GB"), (10**6, "MB"), (10**3, "kB")):
        if number >= unit:
            return f"{number / unit:.4g} {name}"
    return f"{number} bytes"


def space(folder: Path, needed: int) -> str:
    """How much is needed and free, for a message."""
    return f"{size(needed)} are needed, {size(shutil.disk_usage(folder).free)} are free"


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


def open_regular(path: Path) -> BufferedReader:
    """The file, open for reading; OSError unless it is a regular file that lies in its own folder.

    A pipe would wait for ever, and a link in a stranger's folder could lead anywhere.
    """
    if path.is_symlink():
        try:
            target = path.resolve(strict=True)
        except RuntimeError:
            raise OSError(errno.ELOOP, "it is a link that leads to itself") from None
        if not target.is_relative_to(path.parent.resolve()):
            raise OSError(errno.EPERM, "it is a link that leads out of its folder")
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise OSError(errno.EINVAL, "it is not a regular file")
    return os.fdopen(handle, "rb")


def read_regular(path: Path, limit: int) -> bytes:
    """The content of a regular file; OSError as `open_regular`, ValueError when it is longer than `limit` bytes."""
    with open_regular(path) as file:
        if os.fstat(file.fileno()).st_size > limit:
            raise ValueError(f"it is longer than {limit:,} bytes")
        return file.read(limit)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) < len(pairs):
        raise ValueError("a key is there twice")
    return out


def _finite(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise ValueError(f"{text[:20]} is not a finite number")
    return value


def parse_json(data: bytes) -> Any:
    """The value of strict JSON: no key twice, no NaN or infinity; ValueError otherwise, for whatever the bytes are."""
    try:
        return json.loads(data.decode(), object_pairs_hook=_unique, parse_constant=_finite, parse_float=_finite)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def describe(path: Path) -> dict[str, Any]:
    """What a manifest says of a file: {size, sha256}."""
    return {"size": path.stat().st_size, "sha256": sha256(path)}


def fault(path: Path, *accepted: Any) -> str | None:
    """What is wrong with a file that must match one of the `accepted` descriptions; None when nothing is.

    OSError when the disk fails or refuses, which says nothing of the content.
    """
    known = [entry for entry in accepted if isinstance(entry, dict)]
    try:
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            if size not in [entry.get("size") for entry in known]:
                return f"it is {size:,} bytes long, not as its manifest says"
            found = hashlib.file_digest(file, "sha256").hexdigest()
    except FileNotFoundError:
        return "it is missing"
    except OSError as error:
        if error.errno not in NO_FILE:
            raise
        return f"it cannot be read ({error.strerror})"
    if found not in [entry.get("sha256") for entry in known]:
        return "its checksum does not match its manifest; it is damaged or belongs to another model"
    return None


def _seal_of(manifest: dict[str, Any]) -> str:
    body = {key: value for key, value in manifest.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def write_manifest(path: Path, manifest: dict[str, Any]) -> None:
    """Writes the manifest with its own checksum, atomically."""
    write_atomic(path, to_json({**manifest, "sha256": _seal_of(manifest)}))


def read_manifest(path: Path, known_format: int, limit: int = 1 << 20) -> dict[str, Any]:
    """The manifest, its own checksum and format checked; CheckpointError naming the file otherwise."""
    try:
        manifest = parse_json(read_regular(path, limit))
    except OSError as error:
        if error.errno not in NO_FILE:  # a disk that fails or refuses says nothing of the content
            raise
        raise CheckpointError(f"{path}: not a readable manifest ({error.strerror}).") from None
    except ValueError as error:
        raise CheckpointError(f"{path}: not a readable manifest ({error}).") from None
    if not isinstance(manifest, dict) or manifest.get("sha256") != _seal_of(manifest):
        raise CheckpointError(f"{path}: its own checksum does not match; the file is damaged or was edited.")
    if type(manifest.get("format")) is not int or manifest["format"] != known_format:
        raise CheckpointError(f"{path}: format {shown(manifest.get('format'))}, but this recurlm reads {known_format}.")
    if not isinstance(manifest.get("files"), dict):
        raise CheckpointError(f"{path}: it lists no files.")
    return manifest


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Makes the folder and holds its `.lock`, which dies with the process; UserError when another process holds it.

    Where nothing was added in the end, the lock and the folders that were made here are removed again.
    """
    lock = folder / LOCK
    try:
        made = make_folder(folder)
        before = {path.name for path in folder.iterdir()}
    except FileExistsError:
        raise UserError(f"{folder}: a file; choose a folder for the run with -o.") from None
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
                if LOCK not in before and {path.name for path in folder.iterdir()} <= {*before, LOCK}:
                    lock.unlink()
                for path in made:
                    path.rmdir()
