"""`recurlm eval`, `score`, `generate`: a run directory put to use."""

from __future__ import annotations

import gzip
import re
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from recurlm.cli import evaluate
from recurlm.cli.common import Device, Dtype, Json, Threads, note, print_json, print_table, set_threads, unescape
from recurlm.config import parse_options
from recurlm.errors import DataError, RequestError, UserError

Run = Annotated[Path, typer.Argument(help="Run directory.", show_default=False)]
BATCH_LINES = 1024
SAMPLING, BEAM, MIX = "Sampling, in this order", "Beam search", "Caches, dynamic evaluation, mixtures"
SUITE, REPORT = "A suite of tests", "Error analysis"


def eval_(
    run: Run,
    split: Annotated[
        str, typer.Option("--split", help="train, valid or test (default); a single file as --data is read whole.")
    ] = "",
    data: Annotated[
        str, typer.Option("--data", help="Another text than the run's own: file, folder, store or data set.")
    ] = "",
    batch_size: Annotated[
        int | None,
        typer.Option("--batch-size", help="Parallel streams, each from a fresh state; default: 1, with --report 8."),
    ] = None,
    counting: Annotated[
        str,
        typer.Option("--counting", help="exact, or published: awd-lstm-lm's slightly lower way, to compare."),
    ] = "exact",
    batching: Annotated[
        str,
        typer.Option(
            "--batching",
            help="stream: one text; sentence, document: each line, or text between empty lines, afresh. As trained.",
        ),
    ] = "",
    ranks: Annotated[bool, typer.Option("--ranks/--no-ranks", help="Top-1/5/10 and MRR too (slower).")] = True,
    mixed_with: Annotated[
        list[str] | None,
        typer.Option(
            "--with", metavar="RUN", help="Interpolate with this model too; again for more.", rich_help_panel=MIX
        ),
    ] = None,
    cache: Annotated[
        list[str] | None,
        typer.Option(
            "--cache",
            metavar="N|window=N,...",
            help="A unigram cache of the last N tokens (again: the best N), or a neural cache: window, theta, lambda, rule, chunk.",
            rich_help_panel=MIX,
        ),
    ] = None,
    dynamic: Annotated[
        str,
        typer.Option(
            "--dynamic",
            metavar="rule=rms,...",
            help="Dynamic evaluation: rule (rms, sgd), lr, decay, eps, segment, batch, batches, tune_tokens.",
            rich_help_panel=MIX,
        ),
    ] = "",
    tune_on: Annotated[
        str,
        typer.Option(
            "--tune-on",
            metavar="SPLIT",
            help="Search what is not given of theta, lambda, lr, decay there; weights always come from there (valid).",
            rich_help_panel=MIX,
        ),
    ] = "",
    mc_dropout: Annotated[
        int,
        typer.Option(
            "--mc-dropout",
            metavar="K",
            help="The mean of K networks thinned by the run's dropout.",
            rich_help_panel=MIX,
        ),
    ] = 0,
    suite: Annotated[
        str,
        typer.Option(
            "--suite", help="blimp, lambada, gulordava or FILE.jsonl instead of a text.", rich_help_panel=SUITE
        ),
    ] = "",
    source: Annotated[
        str, typer.Option("--from", metavar="DIR", help="Where the suite's files are.", rich_help_panel=SUITE)
    ] = "",
    text_rule: Annotated[
        str,
        typer.Option(
            "--text-rule",
            help="How the training text is written: as-is, ptb, wikitext or tokens; auto: seen from the vocabulary.",
            rich_help_panel=SUITE,
        ),
    ] = "auto",
    report: Annotated[
        Path | None,
        typer.Option(
            "--report", metavar="FILE.html", help="Write an error analysis to this page.", rich_help_panel=REPORT
        ),
    ] = None,
    against: Annotated[
        list[str] | None,
        typer.Option(
            "--against", metavar="RUN", help="Another model beside it; may be given again.", rich_help_panel=REPORT
        ),
    ] = None,
    other: Annotated[
        list[str] | None,
        typer.Option(
            "--other", metavar="TEXT", help="A text of another style; may be given again.", rich_help_panel=REPORT
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the page.", rich_help_panel=REPORT)] = False,
    device: Device = "auto",
    dtype: Dtype = "auto",
    threads: Threads = "auto",
    as_json: Json = False,
) -> None:
    """Perplexity, bits per character and byte, top-k accuracy: recurlm eval runs/book --split test"""
    evaluate.check(
        suite,
        source,
        text_rule,
        report,
        against or other or force,
        data or split or counting != "exact" or batching,
        mixed_with or cache or dynamic or tune_on or mc_dropout,
    )
    set_threads(threads)
    if suite:
        evaluate.suite(run, suite, source, text_rule, device, dtype, as_json)
        return
    if report:
        others = against or [], other or []
        evaluate.report(run, report, *others, data, split, batch_size, force, device, dtype, as_json)
        return
    from recurlm import api, files

    values = api.evaluate(
        run,
        data=data,
        split=split,
        batch_size=1 if batch_size is None else batch_size,
        counting=counting,
        batching=batching,
        with_ranks=ranks,
        device=device,
        dtype=dtype,
        mixed_with=mixed_with or (),
        caches=[int(c) if re.fullmatch(r"[+-]?\d{1,18}", c) else parse_options("--cache", c) for c in cache or ()],
        dynamic=parse_options("--dynamic", dynamic) if dynamic else None,
        tune_on=tune_on,
        mc_dropout=mc_dropout,
        say=note,
    )
    if as_json:
        print_json(values)
    else:
        print_table(values)
    if not (data or mixed_with or cache or dynamic or mc_dropout or batching or counting != "exact"):
        kept = run / api.figures_file(values["split"])
        try:
            files.write_atomic(kept, files.to_json(values))
        except OSError as error:
            note(f"{kept} could not be written ({error.strerror}); the figures above stand.")


def _lines(path: str) -> Iterator[str]:
    """The lines of a file, '-' for stdin, without their ends."""
    if path.endswith((".jsonl", ".jsonl.gz")):
        raise UserError(f"{path}: expected text with one sentence a line, not jsonl.")
    try:
        open_file = gzip.open if path.endswith(".gz") else open
        with sys.stdin.buffer if path == "-" else open_file(path, "rb") as source:
            for number, line in enumerate(source, 1):
                try:
                    text = line.decode("utf-8").removesuffix("\n")
                except UnicodeDecodeError as error:
                    place = "standard input" if path == "-" else path
                    raise DataError(
                        f"{place}, line {number}: not UTF-8 text at byte {error.start} of the line."
                    ) from None
                yield text.removeprefix("\ufeff") if number == 1 else text  # a byte order mark is no text
    except (gzip.BadGzipFile, EOFError, zlib.error):
        raise DataError(f"{path}: this gzip file is damaged or cut short.") from None
    except ValueError as error:
        raise UserError(f"{path!r}: cannot be read: {error}.") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}.") from None


def score(
    run: Run,
    text: Annotated[str, typer.Argument(help="Text file, one sentence a line; - for stdin.")] = "-",
    level: Annotated[str, typer.Option("--level", help="token: a row a token; sentence: a row a line.")] = "token",
    unit: Annotated[str, typer.Option("--unit", help="bits, nats or log10 (log-probabilities).")] = "bits",
    end: Annotated[bool, typer.Option("--end/--no-end", help="Score the line's end too.")] = True,
    device: Device = "auto",
    dtype: Dtype = "auto",
    threads: Threads = "auto",
    as_json: Json = False,
) -> None:
    """Surprisal of each token or line: echo 'strong tea' | recurlm score runs/book"""
    if level not in ("token", "sentence"):
        raise UserError(f"--level {level}: expected token or sentence.")
    set_threads(threads)
    from recurlm import api
    from recurlm.text.store import RETURNS

    model = api.load(run, device=device, dtype=dtype)
    batch: list[str] = []
    done, told = 0, model.tokenizer.kind == "word"  # to which \r is white space
    for line in _lines(text):
        if line.endswith("\r") and not told:
            note(RETURNS)
            told = True
        batch.append(line)
        if len(batch) == BATCH_LINES:
            _print_scores(model, batch, done, level, unit, end, as_json)
            done, batch = done + len(batch), []
    if batch or not done:
        _print_scores(model, batch, done, level, unit, end, as_json)


def _print_scores(model, batch: list[str], first: int, level: str, unit: str, end: bool, as_json: bool) -> None:
    """Prints the rows of a batch; before the first one the header, once nothing can be wrong with it any more."""
    from recurlm.text.tokenizers.base import display

    scores = model.score_all(batch, unit=unit, end=end)
    if not as_json and first == 0:
        value = "log10_probability" if unit == "log10" else "surprisal"
        columns = f"token_id\ttoken\t{value}" if level == "token" else f"tokens\t{value}\tsentence"
        print(f"sentence_id\t{columns}")
    for number, (line, scored) in enumerate(zip(batch, scores, strict=True), first + 1):
        if as_json:
            row: dict = {"sentence_id": number, "text": line, "unit": unit, "total": scored.total}
            if level == "token":
                row |= {"tokens": list(scored.tokens), "surprisals": list(scored.surprisals)}
            print_json(row)
        elif level == "sentence":
            print(f"{number}\t{len(scored.ids)}\t{scored.total:.6f}\t{display(line.encode())}")
        else:
            for position, (token, value) in enumerate(zip(scored.tokens, scored.surprisals, strict=True), 1):
                print(f"{number}\t{position}\t{token}\t{value:.6f}")


def generate(
    run: Run,
    prompt: Annotated[
        str, typer.Option("--prompt", help=r"Text to go on from; \n, \t and \\ are newline, tab and backslash.")
    ] = "",
    tokens: Annotated[int, typer.Option("--tokens", help="Most tokens to generate.")] = 200,
    stop: Annotated[
        list[str] | None, typer.Option("--stop", help=r"End before this string (\n: a line's end); may be given again.")
    ] = None,
    repetition_penalty: Annotated[
        float,
        typer.Option("--repetition-penalty", help="p^r for tokens used already; 1: none.", rich_help_panel=SAMPLING),
    ] = 1.0,
    repetition_window: Annotated[
        int,
        typer.Option(
            "--repetition-window", help="Tokens that it looks back; 0: the whole text.", rich_help_panel=SAMPLING
        ),
    ] = 0,
    temperature: Annotated[
        float,
        typer.Option("--temperature", help="Below 1 safer, above 1 bolder, 0 greedy.", rich_help_panel=SAMPLING),
    ] = 1.0,
    top_k: Annotated[
        int,
        typer.Option("--top-k", help="Draw among the k most probable tokens; 0: all.", rich_help_panel=SAMPLING),
    ] = 0,
    min_p: Annotated[
        float,
        typer.Option(
            "--min-p", help="Draw tokens of at least this share of the best's probability.", rich_help_panel=SAMPLING
        ),
    ] = 0.0,
    top_p: Annotated[
        float,
        typer.Option(
            "--top-p", help="Draw among the most probable tokens that hold this mass.", rich_help_panel=SAMPLING
        ),
    ] = 1.0,
    seed: Annotated[
        int | None, typer.Option("--seed", help="Makes the text repeatable.", rich_help_panel=SAMPLING)
    ] = None,
    beams: Annotated[
        int,
        typer.Option(
            "--beams", help="Search for the most probable text with N beams; no chance.", rich_help_panel=BEAM
        ),
    ] = 0,
    num_return: Annotated[
        int,
        typer.Option(
            "--num-return", help="Texts to return: rows of rank, score, log_prob (nats), text.", rich_help_panel=BEAM
        ),
    ] = 1,
    length_penalty: Annotated[
        float,
        typer.Option(
            "--length-penalty", help="Above 0 favours longer texts (1: about log P a token).", rich_help_panel=BEAM
        ),
    ] = 0.0,
    device: Device = "auto",
    dtype: Dtype = "auto",
    threads: Threads = "auto",
    as_json: Json = False,
) -> None:
    """Go on with a text: recurlm generate runs/book --prompt 'Once upon' --temperature 0.8

    The sampling options act in the order in which they are listed.
    """
    sampled = (repetition_penalty, repetition_window, temperature, top_k, min_p, top_p, seed) != (
        1,
        0,
        1,
        0,
        0,
        1,
        None,
    )
    if beams and sampled:
        raise RequestError("--beams searches without chance and takes none of the sampling options; leave one out.")
    if not beams and (num_return != 1 or length_penalty):
        raise RequestError("--num-return and --length-penalty belong to a beam search; give --beams too.")
    set_threads(threads)
    from recurlm import api

    model = api.load(run, device=device, dtype=dtype)
    prompt, stops = unescape(prompt), [unescape(s) for s in stop or []]
    if beams:
        found = model.beam(
            prompt, tokens=tokens, beams=beams, num_return=num_return, length_penalty=length_penalty, stop=stops
        )
        _print_hypotheses(prompt, found, num_return, as_json)
        return
    pieces = model.stream(
        prompt,
        tokens=tokens,
        repetition_penalty=repetition_penalty,
        repetition_window=repetition_window,
        temperature=temperature,
        top_k=top_k,
        min_p=min_p,
        top_p=top_p,
        seed=seed,
        stop=stops,
    )
    if as_json:
        print_json({"prompt": prompt, "text": model.joined(prompt, "".join(pieces)), "seed": seed})
        return
    try:
        sys.stdout.write("" if model.backward else prompt)
        for piece in pieces:
            sys.stdout.write(piece)
            sys.stdout.flush()
        sys.stdout.write(prompt if model.backward else "")
    finally:
        sys.stdout.write("\n")


def _print_hypotheses(prompt: str, found: list, num_return: int, as_json: bool) -> None:
    from recurlm.text.tokenizers.base import display

    if as_json:
        rows = [{"text": h.text, "log_prob": h.log_prob, "score": h.score, "ended": h.ended} for h in found]
        print_json({"prompt": prompt, "hypotheses": rows})
    elif num_return == 1:
        print(found[0].text)
    else:
        print("rank\tscore\tlog_prob\ttext")
        for rank, h in enumerate(found, 1):
            print(f"{rank}\t{h.score:.6f}\t{h.log_prob:.6f}\t{display(h.text.encode())}")
