"""`recurlm embed`: what a model's input embeddings learned."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from recurlm.cli.common import Json, note, print_json, unescape
from recurlm.cli.use import Run
from recurlm.errors import UserError

app = typer.Typer(no_args_is_help=True)
Most = Annotated[int, typer.Option("--k", help="Rows to show.")]
Among = Annotated[int, typer.Option("--among", help="Look only among the N most frequent tokens; 0: all.")]


@app.callback()
def embed(context: typer.Context, run: Run) -> None:
    """What the input embeddings learned: recurlm embed runs/book near king

    A word is one token of the model. With bpe and unigram most words begin with a space (' king'), which is tried first;
    beside them are shown words that begin with one too, not pieces from inside words. In words \\n, \\t and \\\\ are
    newline, tab and backslash.
    """
    context.obj = run


def _load(context: typer.Context) -> Any:
    from recurlm import api

    return api.load(context.obj, device="cpu")


@app.command()
def near(
    context: typer.Context,
    words: Annotated[list[str], typer.Argument(metavar="WORD...", help="Words to look up.", show_default=False)],
    k: Most = 10,
    among: Among = 0,
    as_json: Json = False,
) -> None:
    """The tokens whose embeddings have the largest cosine with a word's: recurlm embed runs/book near king queen"""
    model = _load(context)
    found = {word: model.neighbours(unescape(word), k=k, among=among) for word in words}
    if as_json:
        return print_json({word: [asdict(row) for row in rows] for word, rows in found.items()})
    print("word\tneighbour\tcosine")
    for word, rows in found.items():
        for row in rows:
            print(f"{word}\t{row.token}\t{row.score:.4f}")
    return None


@app.command()
def analogy(
    context: typer.Context,
    a: Annotated[str, typer.Argument(metavar="A", show_default=False)],
    b: Annotated[str, typer.Argument(metavar="B", show_default=False)],
    c: Annotated[str, typer.Argument(metavar="C", show_default=False)],
    k: Most = 10,
    among: Among = 0,
    method: Annotated[str, typer.Option("--method", help="add (3CosAdd) or mul (3CosMul).")] = "add",
    as_json: Json = False,
) -> None:
    """A is to B as C is to what: recurlm embed runs/book analogy man king woman"""
    rows = _load(context).analogy(unescape(a), unescape(b), unescape(c), k=k, among=among, method=method)
    if as_json:
        return print_json({"a": a, "b": b, "c": c, "method": method, "answers": [asdict(row) for row in rows]})
    print("answer\tscore")
    for row in rows:
        print(f"{row.token}\t{row.score:.4f}")
    return None


@app.command("map")
def map_(
    context: typer.Context,
    out: Annotated[
        Path | None, typer.Option("-o", "--out", metavar="FILE.svg", help="Draw the map here instead of printing it.")
    ] = None,
    top: Annotated[int, typer.Option("--top", help="The most frequent tokens; 2 to 2,000.")] = 300,
    method: Annotated[str, typer.Option("--method", help="tsne (near stays near) or pca.")] = "tsne",
    force: Annotated[bool, typer.Option("--force", help="Replace what is there.")] = False,
    as_json: Json = False,
) -> None:
    """The most frequent tokens in a plane, as rows or as a picture: recurlm embed runs/book map -o map.svg"""
    if out is not None:
        if out.suffix != ".svg":
            raise UserError(f"{out}: the map is an SVG picture; expected a name that ends in .svg.")
        if out.exists() and not force:
            raise UserError(f"{out} exists already; use --force to replace it, or choose another name.")
    found = _load(context).embedding_map(top, method=method)
    if out is not None:
        from recurlm import files

        picture = found.svg(f"{context.obj}: the {len(found.tokens):,} most frequent tokens, {method}")
        try:
            files.write_atomic(out, picture)
        except OSError as error:
            raise UserError(f"{out}: cannot be written: {error.strerror}.") from None
        note(f"{out}: {len(found.tokens):,} tokens.")
    rows = list(zip(found.tokens, found.points, strict=True))
    if as_json:
        return print_json(
            {"out": out and str(out), "method": method, "points": [{"token": t, "x": x, "y": y} for t, (x, y) in rows]}
        )
    if out is None:
        print("token\tx\ty")
        for token, (x, y) in rows:
            print(f"{token}\t{x:.4f}\t{y:.4f}")
    return None
