"""A page that needs nothing but itself: charts by matplotlib as SVG inside HTML, tables, text coloured by surprisal."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any, final

# Okabe and Ito's colours, told apart by colour-blind readers; line styles and markers tell them apart in grey.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = "osD^vP"
MOST_MARKERS = 40  # of one line
FULL = 16.0  # bits at which a word has the darkest colour

Cell = str | int | float | None


@final
@dataclass(frozen=True)
class Series:
    """One line of a chart."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    colour: int = 0
    dashed: bool = False


@final
@dataclass(frozen=True)
class Chart:
    """Lines over numbers (`log`: on a logarithmic axis), or over `categories`, whose places 0, 1, ... are then x.

    `levels` are values of y to draw across in grey.
    """

    x_label: str
    y_label: str
    series: Sequence[Series]
    categories: Sequence[str] = ()
    log: bool = False
    diagonal: bool = False
    log_y: bool = False
    levels: Sequence[float] = ()


@final
@dataclass(frozen=True)
class Table:
    """Rows under a header. Columns whose name ends with % hold shares."""

    header: Sequence[str]
    rows: Sequence[Sequence[Cell]]


@final
@dataclass(frozen=True)
class Section:
    """A question, how it was asked and is read, and the answer."""

    key: str
    title: str
    says: str
    charts: Sequence[Chart] = ()
    tables: Sequence[Table] = ()
    html: str = ""


def svg(chart: Chart, name: str) -> str:
    """The chart as an SVG element; the same input gives the same text. `name` keeps its ids apart from other charts'."""
    import matplotlib
    from matplotlib.figure import Figure

    style: Any = {
        "svg.fonttype": "none", "svg.hashsalt": name, "font.sans-serif": ["Helvetica", "Arial", "DejaVu Sans"],
        "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.color": "#dddddd",
        "axes.axisbelow": True,
    }  # fmt: skip
    with matplotlib.rc_context(style), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of fonts that are not here: the reader's browser draws the letters
        figure = Figure((6.2, 3.1), dpi=72, layout="constrained")
        axes = figure.add_subplot()
        if chart.diagonal:
            axes.plot([0, 1], [0, 1], color="#999999", linewidth=1)
        for level in chart.levels:
            axes.axhline(level, color="#999999", linewidth=1)
        for s in chart.series:
            plain = s.dashed or len(s.x) > MOST_MARKERS
            axes.plot(
                s.x, s.y, color=COLOURS[s.colour % len(COLOURS)], label=s.name, linewidth=1.6, markersize=4,
                linestyle="--" if s.dashed else "-", marker=None if plain else MARKERS[s.colour % len(MARKERS)],
            )  # fmt: skip
        if chart.log:
            axes.set_xscale("log")
        if chart.categories:
            axes.set_xticks(range(len(chart.categories)), chart.categories)
        elif chart.log:
            ticks = sorted({x for s in chart.series for x in s.x})
            axes.set_xticks(ticks, [f"{x:g}" for x in ticks])
            axes.minorticks_off()
        if chart.log_y:
            _logarithmic(axes, chart)
        axes.set(xlabel=chart.x_label, ylabel=chart.y_label)
        if len(chart.series) > 1:
            above: Any = {"loc": "lower left", "bbox_to_anchor": (0, 1), "ncols": 3 if len(chart.series) == 3 else 2}
            axes.legend(frameon=False, fontsize=9, borderaxespad=0.2, columnspacing=1.2, **above)
        out = io.StringIO()
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    drawn = re.sub(r"<metadata>.*?</metadata>", "", out.getvalue()[out.getvalue().index("<svg") :], flags=re.DOTALL)
    label = escape(f"{chart.y_label} by {chart.x_label}", quote=True)
    return drawn.replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1)


def _logarithmic(axes: Any, chart: Chart) -> None:
    """Makes the y axis logarithmic, from the lowest value to twice it, or to where every line can be seen."""
    from matplotlib.ticker import MaxNLocator

    lowest = [min(y for y in s.y if y > 0) for s in chart.series]
    low = 0.97 * min([*lowest, *chart.levels])
    most = max(y for s in chart.series for y in s.y)
    high = 1.03 * max(min(most, 2 * low), 1.2 * max(lowest), *chart.levels)
    for marks in (
        (1, 1.2, 1.5, 2, 2.5, 3, 3.5, 4, 4.5, 5, 5.5, 6, 6.5, 7, 8, 9),
        (1, 1.5, 2, 3, 4, 5, 7),
        (1, 2, 5),
        (1,),
    ):
        ticks = [t for e in range(-3, 300) for m in marks if low <= (t := m * 10.0**e) <= high]
        if len(ticks) <= 12:  # more would be printed over each other
            break
    if len(ticks) < 3:  # a small part of a decade
        ticks = [t for t in MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high) if low <= t <= high]
    axes.set_yscale("log")
    axes.set_ylim(low, high)
    axes.set_yticks(ticks, [f"{t:g}" for t in ticks])
    axes.minorticks_off()


def shown(value: Cell, column: str = "") -> str:
    """A cell as people read it."""
    if value is None:
        return "–"
    if isinstance(value, str):
        return value
    if column.endswith("%"):
        return f"{100 * value:.1f}"
    if isinstance(value, int):
        return f"{value}" if column == "seed" else f"{value:,}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.1f}" if abs(value) >= 100 else f"{value:.2f}"


def table(data: Table) -> str:
    """The table as HTML."""
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in data.header)
    rows = []
    for row in data.rows:
        cells = [f'<th scope="row">{escape(shown(row[0]))}</th>']
        cells += [f"<td>{escape(shown(v, c))}</td>" for v, c in zip(row[1:], data.header[1:], strict=True)]
        rows.append(f"<tr>{''.join(cells)}</tr>")
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'


def coloured(words: Sequence[str], bits: Sequence[float]) -> str:
    """The words of a line as HTML, the darker the more surprising."""
    spans = [
        f'<span style="--s:{min(1.0, max(0.0, b) / FULL):.2f}" title="{b:.1f} bits">{escape("⏎" if w == chr(10) else w)}</span>'
        for w, b in zip(words, bits, strict=True)
    ]
    return f'<p class="line">{" ".join(spans)}</p>'


STYLE = """
:root { color-scheme: light }
body { font: 16px/1.5 system-ui, "Segoe UI", Helvetica, Arial, sans-serif; color: #1a1a1a; background: #fff;
  max-width: 62rem; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.7rem; margin: 0 0 .3rem } h2 { font-size: 1.2rem; margin: 2.4rem 0 .3rem }
p { max-width: 46rem; margin: .4rem 0 } .note { color: #444; font-size: .92rem }
nav { columns: 3 14rem; font-size: .92rem; margin: 1rem 0 } nav a { display: block; color: #00558b }
.row { display: flex; flex-wrap: wrap; gap: 1rem 2rem; align-items: flex-start; margin: .6rem 0 }
.row svg { width: 29rem; max-width: 100%; height: auto } .scroll { overflow-x: auto; max-width: 100% }
table { border-collapse: collapse; font-size: .88rem; font-variant-numeric: tabular-nums }
th, td { padding: .18rem .6rem; border-bottom: 1px solid #ddd; text-align: right; vertical-align: top }
th:first-child { text-align: left } tbody th { font-weight: normal }
thead th { border-bottom: 2px solid #888; vertical-align: bottom; max-width: 12rem }
.line { font-family: Georgia, "Times New Roman", serif; margin: .2rem 0 .9rem; line-height: 1.9 }
.line span { background: rgba(213, 94, 0, calc(var(--s) * .75)); border-radius: .2rem; padding: .1rem .15rem;
  -webkit-print-color-adjust: exact; print-color-adjust: exact }
@media print { body { margin: 0; max-width: none; font-size: 11pt } nav { display: none }
  section, .row, .line, tr { break-inside: avoid } h2 { break-after: avoid } .row svg { width: 24rem } }
"""


def page(title: str, lead: str, sections: Sequence[Section]) -> str:
    """The whole page as HTML without a single reference to another file."""
    links = "".join(f'<a href="#{s.key}">{escape(s.title)}</a>' for s in sections)
    parts = []
    for s in sections:
        figures = "".join(svg(chart, f"{s.key}-{n}") for n, chart in enumerate(s.charts))
        tables = "".join(table(t) for t in s.tables)
        parts.append(
            f'<section id="{s.key}"><h2>{escape(s.title)}</h2><p class="note">{escape(s.says)}</p>'
            f'<div class="row">{figures}{tables}</div>{s.html}</section>'
        )
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head><body><h1>{escape(title)}</h1>"
        f'<p class="note">{escape(lead)}</p><nav aria-label="Contents">{links}</nav>{"".join(parts)}</body></html>\n'
    )
