"""Labelled points as an SVG picture whose text stays text."""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Iterator, Sequence

import numpy as np

INCHES_PER_LABEL = 0.7  # the page grows with the square root of the labels, so that it stays as dense
SIZE = 8  # of the letters, in points
ROOM = 1.15  # the reader's font may be wider than ours


def draw(labels: Sequence[str], points_N2: Sequence[tuple[float, float]], title: str, kind: str = "svg") -> bytes:
    """The picture as SVG (or another `kind` that matplotlib writes); the same input gives the same bytes.

    Every point has a dot; its label stands at the nearest place where it covers no earlier label, with a hairline to
    its dot. Labels are placed in the order given, so the first get the best places.
    """
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    points = np.asarray(points_N2, float).reshape(-1, 2)
    width = max(8.0, INCHES_PER_LABEL * math.sqrt(len(points)))
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "recurlm"}), warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", "Glyph"
        )  # of a script that the measuring font lacks; the reader's may have it
        figure = Figure((width, 0.75 * width), dpi=72)  # a pixel is then a point, as in SVG
        renderer = FigureCanvasAgg(figure).get_renderer()
        axes = figure.add_axes((0.03, 0.03, 0.94, 0.91))
        axes.set_title(title, fontsize=SIZE + 2)
        axes.set_xticks([])
        axes.set_yticks([])
        low, high = points.min(0), points.max(0)
        room = np.where(high > low, 0.06 * (high - low), 1.0)
        axes.set(xlim=(low[0] - room[0], high[0] + room[0]), ylim=(low[1] - room[1], high[1] + room[1]))
        axes.scatter(points[:, 0], points[:, 1], s=6, c="#6a9fd4", linewidths=0)
        at = axes.transData.transform(points)
        boxes = np.empty((len(points), 4))
        for n, label in enumerate(labels):
            text = axes.text(0, 0, label, fontsize=SIZE, ha="center", va="center", parse_math=False, zorder=3)
            extent = text.get_window_extent(renderer)
            half = np.array([ROOM * extent.width, extent.height]) / 2
            for move in _outwards(SIZE / 2, 40 * SIZE):
                box = np.concatenate([at[n] + move - half, at[n] + move + half])
                if not _covers(box, boxes[:n]):
                    break
            boxes[n] = box
            place, dot = axes.transData.inverted().transform([at[n] + move, at[n]])
            text.set_position(place)
            if np.hypot(*move) > SIZE:
                axes.plot([dot[0], place[0]], [dot[1], place[1]], color="#c8c8c8", linewidth=0.4, zorder=1)
        out = io.BytesIO()
        figure.savefig(out, format=kind, metadata={"Date": None} if kind == "svg" else None)
    return out.getvalue()


def _outwards(step: float, furthest: float) -> Iterator[np.ndarray]:
    """Moves on rings that widen by `step`, first one to the row just above the point."""
    radius = step * 1.5
    while radius <= furthest:
        places = max(8, int(radius / step * 3))
        for n in range(places):
            angle = math.pi / 2 + 2 * math.pi * n / places
            yield np.array([1.5 * radius * math.cos(angle), radius * math.sin(angle)])
        radius += step


def _covers(box: np.ndarray, boxes: np.ndarray) -> bool:
    """Whether the box (left, low, right, high) overlaps one of `boxes`."""
    apart = (box[0] >= boxes[:, 2]) | (box[2] <= boxes[:, 0]) | (box[1] >= boxes[:, 3]) | (box[3] <= boxes[:, 1])
    return not apart.all()
