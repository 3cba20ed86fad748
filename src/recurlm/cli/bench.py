"""`recurlm bench`: speed, measured here."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from recurlm.cli.common import Json, Threads, note, print_json, set_threads
from recurlm.errors import RunError


def bench(
    names: Annotated[
        list[str] | None,
        typer.Argument(metavar="NAME...", help="Measurements; none: all that this machine can run."),
    ] = None,
    list_them: Annotated[bool, typer.Option("--list", help="Only say what there is, and what can run here.")] = False,
    out: Annotated[Path | None, typer.Option("-o", "--out", help="Keep the result in this folder.")] = None,
    threads: Threads = "auto",
    as_json: Json = False,
) -> None:
    """Measure speed on this machine beside a peer and the hardware's limit: recurlm bench inference"""
    set_threads(threads)
    from recurlm import bench as room
    from recurlm.bench.timing import table

    if list_them:
        facts = room.listing(names or [])
        if as_json:
            return print_json({"measurements": facts})
        width = max(len(it["name"]) for it in facts)
        for it in facts:
            print(f"{it['name']:<{width}}  {it['what']}")
            if it["lacks"]:
                print(f"{'':<{width}}  not here: {it['lacks']}")
        return None

    def show(name: str, rows: list, why: str) -> None:
        if why:
            note(f"{name}: {why}")
        elif not as_json:
            from rich.console import Console

            console = Console()
            console.print(table(name, rows, console.width))

    record = room.run(names or [], out=out, begin=lambda name: note(f"Measuring {name} ..."), show=show)
    if as_json:
        print_json(record)
    if "file" in record:
        note(f"Kept in {record['file']}")
    if record["failed"]:
        raise RunError(f"Failed: {', '.join(record['failed'])}.")
    return None
