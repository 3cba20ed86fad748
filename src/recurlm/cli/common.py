"""What the verbs share: options, results on stdout, progress on stderr."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from recurlm.errors import ConfigError

Device = Annotated[str, typer.Option("--device", help="auto, cpu, cuda or cuda:N.", rich_help_panel="Machine")]
Dtype = Annotated[str, typer.Option("--dtype", help="auto, fp32, tf32 or bf16.", rich_help_panel="Machine")]
Threads = Annotated[str, typer.Option("--threads", help="CPU threads: auto or a number.", rich_help_panel="Machine")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]


def set_threads(threads: str) -> None:
    """Sets torch's CPU threads; 'auto' leaves torch's own choice."""
    if threads == "auto":
        return
    if not threads.isdecimal() or not 1 <= int(threads) <= 1024:
        raise ConfigError(f"--threads {threads}: expected auto or a number from 1 to 1024.")
    import torch

    torch.set_num_threads(int(threads))


def parse_duration(text: str) -> float:
    """Seconds of '90', '90s', '10m', '1.5h' or '1h30m'; infinity for ''."""
    if not text:
        return math.inf
    parts = re.findall(r"(\d+(?:\.\d+)?)([smhd]?)", text)
    if not parts or "".join(n + u for n, u in parts) != text:
        raise ConfigError(f"--max-time {text!r}: expected a time such as 90s, 10m or 1h30m.")
    unit = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}
    return sum(float(n) * unit[u] for n, u in parts)


def duration(seconds: float) -> str:
    """The time as people say it: '48 s', '12 min', '3 h 25 min', '2 days 4 h'."""
    minutes, hours = round(seconds / 60), round(seconds / 3600)
    if seconds < 60:
        return f"{seconds:.0f} s"
    if minutes < 60:
        return f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60} min" if hours < 48 else f"{hours // 24} days {hours % 24} h"


def parse_size(text: str) -> int:
    """Bytes of '14MB', '2GB', '500 kB' or '64MiB'; 0 for ''."""
    if not text:
        return 0
    unit = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}
    found = re.fullmatch(r"([0-9]{1,12}(?:\.[0-9]{1,6})?) ?([A-Za-z]*)", text)
    if not found or found[2].lower() not in unit or (size := int(float(found[1]) * unit[found[2].lower()])) < 1:
        raise ConfigError(f"The size {text[:60]!r} is none; expected a number of bytes such as 14MB or 2GB.")
    return size


def print_json(value: Any) -> None:
    """One JSON object on stdout."""
    print(json.dumps(value, ensure_ascii=False, allow_nan=False))


def print_table(rows: dict[str, Any]) -> None:
    """Names and values, aligned, on stdout; a table within is a row for each of its values."""
    rows = {
        f"{name} {key}" if key else name: value
        for name, found in rows.items()
        for key, value in (found.items() if isinstance(found, dict) else [("", found)])
    }
    width = max(map(len, rows), default=0)
    for name, value in rows.items():
        if isinstance(value, float):
            shown = f"{value:,.4f}" if value == 0 or 0.01 <= abs(value) < 1e12 else f"{value:.5g}"
        else:
            shown = f"{value:,}" if type(value) is int else str(value)
        print(f"{name:<{width}}  {shown}")


def print_rows(lines: list[list[str]]) -> None:
    """Lines of cells as columns, the first of them flush left."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for first, *rest in lines:
        cells = [first.ljust(widths[0]), *(c.rjust(w) for c, w in zip(rest, widths[1:], strict=True))]
        print("  ".join(cells).rstrip())


def note(text: str) -> None:
    """One line on stderr."""
    print(text, file=sys.stderr, flush=True)


def program() -> str:
    """How the user can call recurlm from here: its name, or the path of this environment's script."""
    if shutil.which("recurlm"):
        return "recurlm"
    path = Path(sys.argv[0])
    return os.path.relpath(path) if path.name == "recurlm" else f"{sys.executable} -m recurlm"


_ESCAPES = {"\\n": "\n", "\\t": "\t", "\\\\": "\\"}


def unescape(text: str) -> str:
    """The text with \\n, \\t and \\\\ as newline, tab and backslash; any other backslash is itself."""
    return re.sub(r"\\[nt\\]", lambda found: _ESCAPES[found[0]], text)
