"""How long `recurlm --help` takes: a light start is a promise of this package."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

from recurlm.bench.timing import Row, cpu_time

COMMANDS = {
    "recurlm --help": ["-m", "recurlm", "--help"],
    "import torch": ["-c", "import torch"],
    "python -c pass": ["-c", "pass"],
}


def rows() -> list[dict[str, Any]]:
    """One row: the start of recurlm, beside `import torch`, bare Python being the limit; medians of seven starts."""

    def start(arguments: list[str]) -> None:
        subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)

    works = {name: lambda a=arguments: start(a) for name, arguments in COMMANDS.items()}
    ours, peer, limit = (times.median for times in cpu_time(works, seconds=0, rounds=7).values())
    row = Row(
        measure="recurlm --help", shape="a process", ours_us=ours, peer="import torch", peer_us=peer, limit_us=limit,
        target="under 0.4 s",
    )  # fmt: skip
    return [row.as_dict()]
