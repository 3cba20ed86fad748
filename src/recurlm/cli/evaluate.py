"""What `recurlm eval` does beyond perplexity: suites and the page of errors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from recurlm.cli.common import note, print_json, print_rows, print_table
from recurlm.errors import RequestError


def check(
    suite: str, source: str, text_rule: str, report: Path | None, of_report: object, of_text: object, adapted: object
) -> None:
    """None; RequestError for options that do not go together."""
    if adapted and (suite or report):
        raise RequestError(
            "--with, --cache, --dynamic, --tune-on and --mc-dropout change how a text is measured; leave out --suite and --report."
        )
    if suite and (report or of_text):
        raise RequestError(
            "--suite measures the suite's own sentences; leave out --report and what names or reads a text."
        )
    if not suite and (source or text_rule != "auto"):
        raise RequestError("--from and --text-rule belong to a suite; give --suite too.")
    if not report and of_report:
        raise RequestError("--against, --other and --force belong to an error analysis; give --report FILE.html too.")


def suite(run: Path, name: str, source: str, text_rule: str, device: str, dtype: str, as_json: bool) -> None:
    """Prints a suite's results: the whole, and a row for each family, or for each group where there are no families."""
    from recurlm import api

    found = api.evaluate_suite(run, name, source=source, text_rule=text_rule, device=device, dtype=dtype)
    if as_json:
        return print_json(found)
    families, groups, published = found.pop("families"), found.pop("groups"), found.pop("published")
    whole = {k: "none" if v is None else v for k, v in found.items()}
    print_table(whole | {f"published, {who} (%)": value for who, value in published.get("", {}).items()})
    if rows := families or groups:
        print()
        _print_rows(rows, published)
    return None


def _print_rows(rows: dict[str, dict[str, Any]], published: dict[str, dict[str, float]]) -> None:
    """Accuracies in percent, aligned, ties counted as wrong; published ones beside."""
    others = sorted({who for name in rows for who in published.get(name, {})})
    lines = [
        [
            "",
            "items",
            "accuracy %",
            "ties",
            "in vocabulary",
            "accuracy there %",
            *(f"published: {who}" for who in others),
        ]
    ]
    for name, row in rows.items():
        accuracies = [_percent(row[key]) for key in ("accuracy", "accuracy_in_vocabulary")]
        beside = [f"{published[name][who]:.1f}" if who in published.get(name, {}) else "" for who in others]
        cells = [f"{row['items']:,}", accuracies[0], f"{row['ties']:,}", f"{row['in_vocabulary']:,}", accuracies[1]]
        lines.append([name, *cells, *beside])
    print_rows(lines)


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.1f}"


def report(
    run: Path, out: Path, against: list[str], other: list[str], data: str, split: str, batch_size: int | None, force: bool,
    device: str, dtype: str, as_json: bool,
) -> None:  # fmt: skip
    """Writes the page and prints each model's overall figures."""
    from recurlm import api

    streams = 8 if batch_size is None else batch_size  # one stream takes several times as long
    numbers = api.report(
        run,
        out,
        against=against,
        others=other,
        data=data,
        split=split,
        batch_size=streams,
        overwrite=force,
        device=device,
        dtype=dtype,
        say=note,
    )
    if as_json:
        return print_json(numbers)
    for name, values in numbers["summary"].items():
        print(name)
        print_table(values)
    if streams > 1:
        note(
            f"Read in {streams} streams; `recurlm eval` reads in one (here: --batch-size 1), so its figures may differ a little."
        )
    note(f"{out}: open it in a browser; it needs no network.")
    return None
