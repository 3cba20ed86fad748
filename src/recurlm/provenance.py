"""What made a result: the version and commit of this source, torch's version, and the command."""

from __future__ import annotations

import contextlib
import functools
import os
import shlex
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any


def facts() -> dict[str, Any]:
    """recurlm, commit, torch, command."""
    import torch

    version = "unknown"
    with contextlib.suppress(metadata.PackageNotFoundError):  # its sources, not installed
        version = metadata.version("recurlm")
    return {"recurlm": version, "commit": _commit(), "torch": torch.__version__, "command": command()}


def command() -> str:
    """The command line of this process, as a shell reads it."""
    program = Path(sys.argv[0]).name.replace("__main__.py", "recurlm")
    return shlex.join([program, *sys.argv[1:]]).encode(errors="backslashreplace").decode()  # a path need not be Unicode


def commit() -> str:
    """The commit of the source that runs: RECURLM_COMMIT, or git's in a checkout ("+changes" after an edit); "" if unknown."""
    if named := os.environ.get("RECURLM_COMMIT"):
        return named
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():  # installed: a repository further up is another project's
        return ""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True).stdout

    try:
        return git("rev-parse", "HEAD").strip() + "+changes" * bool(git("status", "--porcelain", "--", "src"))
    except (OSError, subprocess.CalledProcessError):
        return ""


_commit = functools.cache(commit)
