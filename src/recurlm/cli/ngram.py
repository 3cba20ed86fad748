"""`recurlm ngram`: n-gram models trained, pruned, asked, and exchanged as ARPA files."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from typing import Annotated, Any

import typer

from recurlm.cli.common import Json, note, parse_size, print_json, print_table, unescape
from recurlm.errors import ConfigError, DataError, RequestError

app = typer.Typer(help="N-gram models: train, prune, query; ARPA files in and out.", no_args_is_help=True)

Out = Annotated[Path, typer.Option("-o", "--out", metavar="RUN", help="Run directory to make.")]
Arpa = Annotated[Path | None, typer.Option("--arpa", metavar="FILE", help="Write an ARPA file too (.gz: packed).")]
Run = Annotated[Path, typer.Argument(help="Run directory of an n-gram model.", show_default=False)]
ESTIMATION, COUNTING, TOKENS = "Estimation", "Counting", "Tokenizer (unless DATA is a store)"


def _numbers(text: str, option: str, kind: type) -> tuple[Any, ...]:
    try:
        return tuple(kind(part) for part in text.split(",")) if text else ()
    except ValueError:
        raise ConfigError(f"{option} {text}: expected numbers with commas between them, such as 0,0,1.") from None


@app.command("train")
def train(
    data: Annotated[str, typer.Argument(help="Text file, folder with train/valid/test, store, or name of a data set.")],
    out: Out,
    order: Annotated[
        int, typer.Option("--order", help="Words of the longest n-grams.", rich_help_panel=ESTIMATION)
    ] = 5,
    smoothing: Annotated[
        str,
        typer.Option(
            help="kneser-ney (interpolated, modified), katz, jelinek-mercer or stupid-backoff.",
            rich_help_panel=ESTIMATION,
        ),
    ] = "kneser-ney",
    cutoffs: Annotated[
        str,
        typer.Option(
            help="Leave out what occurs so often or less: 0,0,1 from trigrams on once.", rich_help_panel=ESTIMATION
        ),
    ] = "",
    discount_fallback: Annotated[
        str,
        typer.Option(
            help="kneser-ney: discounts where the counts give none, as 0.5,1,1.5.", rich_help_panel=ESTIMATION
        ),
    ] = "",
    interpolate_unigrams: Annotated[
        bool,
        typer.Option(
            "--interpolate-unigrams/--no-interpolate-unigrams",
            help="kneser-ney: share what is left of the unigrams among all words.",
            rich_help_panel=ESTIMATION,
        ),
    ] = True,
    arpa: Arpa = None,
    tokenizer: Annotated[str, typer.Option(help="word, char, byte, bpe or unigram.", rich_help_panel=TOKENS)] = "word",
    vocab_size: Annotated[int, typer.Option(help="Largest vocabulary; 0 = default.", rich_help_panel=TOKENS)] = 0,
    min_count: Annotated[int, typer.Option(help="word, char: rarer types become unknown.", rich_help_panel=TOKENS)] = 1,
    tokenizer_of: Annotated[
        Path | None,
        typer.Option(metavar="RUN", help="The tokenizer of this run or store, to mix both.", rich_help_panel=TOKENS),
    ] = None,
    out_of_core: Annotated[
        bool | None,
        typer.Option(
            "--out-of-core/--in-memory",
            help="Sort on the disk with DuckDB; default: above 30 million tokens.",
            rich_help_panel=COUNTING,
        ),
    ] = None,
    memory_limit: Annotated[
        str, typer.Option(help="Out of core: what the database may take.", rich_help_panel=COUNTING)
    ] = "1500MB",
    as_json: Json = False,
) -> None:
    """Estimate a model: recurlm ngram train book.txt --order 5 -o runs/kn5"""
    from recurlm.config import from_dict
    from recurlm.ngram import run
    from recurlm.ngram.smoothing import Settings

    fallback = _numbers(discount_fallback, "--discount-fallback", float)
    if fallback and not (len(fallback) == 3 and all(0 <= d <= j for j, d in enumerate(fallback, 1))):
        raise ConfigError(
            f"--discount-fallback {discount_fallback}: expected three discounts up to 1, 2 and 3: 0.5,1,1.5."
        )
    settings = Settings(
        smoothing=smoothing,
        cutoffs=_numbers(cutoffs, "--cutoffs", int),
        fallback=fallback or None,  # type: ignore[arg-type]
        interpolate_unigrams=interpolate_unigrams,
    )
    if tokenizer_of is not None and (tokenizer, vocab_size, min_count) != ("word", 0, 1):
        raise ConfigError("--tokenizer-of names a tokenizer that is there; leave out what would make another one.")
    words = from_dict({"tokenizer": {"kind": tokenizer, "vocab_size": vocab_size, "min_count": min_count}}).tokenizer
    facts = run.train(
        data, out, order=order, settings=settings, tokenizer=words, tokenizer_of=tokenizer_of,
        out_of_core=out_of_core, memory_limit=f"{parse_size(memory_limit)}B", arpa_file=arpa, say=note,
    )  # fmt: skip
    _print_facts(out, facts, as_json)


@app.command("prune")
def prune(
    source: Run,
    out: Out,
    threshold: Annotated[
        float, typer.Option(help="Leave out what raises perplexity by less than this share: 1e-8 few, 1e-6 most.")
    ] = 1e-8,
    arpa: Arpa = None,
    as_json: Json = False,
) -> None:
    """Make a model smaller where it hurts least: recurlm ngram prune runs/kn5 --threshold 1e-7 -o runs/small"""
    from recurlm.ngram import run

    _print_facts(out, run.prune(source, out, threshold, arpa_file=arpa), as_json)


@app.command("import")
def import_(
    file: Annotated[Path, typer.Argument(help="ARPA file (.gz: packed).")],
    out: Out,
    normalised: Annotated[
        bool, typer.Option("--normalised/--any-sum", help="Refuse a model whose probabilities do not sum to one.")
    ] = True,
    as_json: Json = False,
) -> None:
    """Make a run directory of an ARPA file: recurlm ngram import model.arpa -o runs/theirs"""
    from recurlm.ngram import run

    _print_facts(out, run.import_arpa(file, out, normalised=normalised), as_json)


@app.command("export")
def export(
    source: Run, file: Annotated[Path, typer.Argument(help="ARPA file to write (.gz: packed).")], as_json: Json = False
) -> None:
    """Write a model as an ARPA file: recurlm ngram export runs/kn5 kn5.arpa"""
    from recurlm.ngram import run

    run.export_arpa(source, file)
    if as_json:
        return print_json({"file": str(file)})
    return print(file)


def _print_facts(out: Path, facts: dict[str, Any], as_json: bool) -> None:
    if as_json:
        return print_json({"run": str(out), **facts})
    if facts.get("normalised") is False:
        note("The scores of this model are no probabilities: they do not sum to one, and its perplexity means nothing.")
    shown = {name: facts[name] for name in ("order", "ngrams", "ppl", "discounts") if facts.get(name) is not None}
    if "ppl" in shown:
        shown["ppl"] = {facts["loss_split"]: shown["ppl"]}
    if "discounts" in shown:
        shown["discounts"] = [[round(d, 3) for d in level] for level in shown["discounts"]]
    return print_table({"run": str(out), **shown})


@app.command("query")
def query(
    source: Run,
    texts: Annotated[list[str] | None, typer.Argument(help="Lines; none: lines of standard input.")] = None,
    summary: Annotated[bool, typer.Option("--summary", help="Perplexity by the length of n-gram found.")] = False,
    next_: Annotated[
        int, typer.Option("--next", metavar="K", help="The K likeliest next words after each text, and how far apart.")
    ] = 0,
    as_json: Json = False,
) -> None:
    """Which n-gram gave each word its probability: recurlm ngram query runs/kn5 'the cat sat'

    With --next 5 'amazing because' 'awesome because': the next words, and the divergence of the two distributions
    (Jensen-Shannon, 0 to 1 bit); that is asked of neural models too.
    """
    lines = list(map(unescape, texts)) if texts else list(_stdin())
    if next_:
        from recurlm import api

        loaded = api.load(source)
        return _next(loaded.model, loaded.tokenizer, lines, next_, as_json)
    from recurlm.ngram import run
    from recurlm.ngram.query import by_length, explain

    model, tokenizer = run.load(source)
    found = [explain(model, tokenizer, line) for line in lines]
    if summary:
        if not found:
            raise RequestError("There is no line to summarise; give texts, or lines on standard input.")
        rows = by_length(found)
        if as_json:
            return print_json(rows)
        print("length\ttokens\tshare\tppl")
        for row in rows:
            length = "all" if row["length"] == -1 else row["length"] or "unknown"
            print(f"{length}\t{row['tokens']}\t{row['share']:.4f}\t{row['ppl']:.3f}")
        return None
    if not as_json:
        print("sentence_id\ttoken_id\ttoken\tlength\tlog10")
    for number, line in enumerate(found, 1):
        if as_json:
            rows = [{"token": f.token, "length": f.length, "log10": f.log10} for f in line]
            print_json({"sentence_id": number, "total": sum(f.log10 for f in line), "tokens": rows})
            continue
        for place, f in enumerate(line, 1):
            print(f"{number}\t{place}\t{f.token}\t{f.length}\t{f.log10:.6f}")
    return None


def _stdin() -> Iterator[str]:
    for number, line in enumerate(sys.stdin.buffer, 1):
        try:
            yield line.decode().removesuffix("\n")
        except UnicodeDecodeError:
            raise DataError(f"standard input, line {number}: not UTF-8 text.") from None


def _next(model: Any, tokenizer: Any, contexts: list[str], k: int, as_json: bool) -> None:
    from recurlm.inference.contexts import jensen_shannon, next_token

    if not 1 <= k <= tokenizer.vocab_size:
        raise RequestError(f"--next {k}: expected 1 to {tokenizer.vocab_size:,}, the number of words.")
    after = [next_token(model, [tokenizer.boundary_id, *tokenizer.encode_prefix(text).tolist()]) for text in contexts]
    best = [log_probs_V.topk(k) for log_probs_V in after]
    rows = [
        [
            {"token": tokenizer.token(id), "p": p}
            for p, id in zip(top.values.exp().tolist(), top.indices.tolist(), strict=True)
        ]
        for top in best
    ]
    pairs = [
        {"a": contexts[a], "b": contexts[b], "divergence_bits": jensen_shannon(after[a], after[b])}
        for a, b in combinations(range(len(contexts)), 2)
    ]
    if as_json:
        return print_json({"next": dict(zip(contexts, rows, strict=True)), "pairs": pairs})
    for context, row in zip(contexts, rows, strict=True):
        print(f"{context}\t" + "  ".join(f"{word['token']} {word['p']:.4f}" for word in row))
    for pair in pairs:
        print(f"{pair['a']} | {pair['b']}\tJensen-Shannon divergence {pair['divergence_bits']:.4f} bits")
    return None
