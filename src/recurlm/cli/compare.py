"""`recurlm compare`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from recurlm.cli.common import Json, note, print_json, print_rows


def compare(
    runs: Annotated[list[Path], typer.Argument(help="Run directories, finished or not.", show_default=False)],
    out: Annotated[
        Path | None, typer.Option("-o", "--out", metavar="FILE.html", help="Write a page with curves.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the page.")] = False,
    as_json: Json = False,
) -> None:
    """Runs side by side, with the published figures: recurlm compare runs/a runs/b -o runs.html"""
    from recurlm import api
    from recurlm.evaluation.page import shown

    found = api.compare(runs, out, overwrite=force)
    if as_json:
        return print_json(found)
    print_rows(
        [
            found["header"],
            *([shown(cell, name) for cell, name in zip(row, found["header"], strict=True)] for row in found["rows"]),
        ]
    )
    if out is not None:
        note(f"{out}: open it in a browser; it needs no network.")
    return None
