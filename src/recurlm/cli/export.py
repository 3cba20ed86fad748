"""`recurlm export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from recurlm.cli.common import Json, parse_size, print_json, print_table
from recurlm.errors import ConfigError
from recurlm.files import size


def export(
    run: Annotated[Path, typer.Argument(help="Run directory.", show_default=False)],
    out: Annotated[Path | None, typer.Option("-o", "--out", help="Folder to make.")] = None,
    dtype: Annotated[str, typer.Option("--dtype", help="How the weights are stored: fp32 or bf16.")] = "fp32",
    max_shard_size: Annotated[
        str,
        typer.Option("--max-shard-size", metavar="SIZE", help="Largest file of weights, such as 14MB; else one file."),
    ] = "",
    card_only: Annotated[
        bool,
        typer.Option("--card-only", help="Only the small texts: card, settings and figures, to keep with a project."),
    ] = False,
    as_json: Json = False,
) -> None:
    """A run's model without what training needs, to move or to keep: recurlm export runs/book -o book --dtype bf16"""
    if out is None:
        raise ConfigError("No folder was named: give -o, such as -o exported.")
    if card_only and (max_shard_size or dtype != "fp32"):
        raise ConfigError("--card-only writes no weights; leave out --dtype and --max-shard-size.")
    from recurlm import api

    written = api.export(run, out, dtype=dtype, max_shard_size=parse_size(max_shard_size), card_only=card_only)
    if as_json:
        return print_json({"folder": str(out), "files": written})
    return print_table({name: size(number) for name, number in written.items()})
