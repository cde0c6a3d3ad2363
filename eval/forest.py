"""Values with their intervals: the accuracy of every row, and forest plots of differences. Percent and points.

Functions return a matplotlib Figure made without pyplot, as those of eval.figures do.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from eval.figures import LINES

MARKS: dict[str, tuple[str, str]] = {
    "rows": (LINES[0], "o"),
    "synthetic": (LINES[0], "o"),
    "real": (LINES[1], "s"),
    "both": (LINES[2], "^"),
}
"""Colour and shape of each kind of value: a row's; what synthetic images add; what real ones alone do; one against the
other."""
LEGEND = {
    "rows": "here, with 95 % interval",
    "synthetic": "synthetic images",
    "real": "real images alone",
    "both": "synthetic against real",
}
ONE_SEED, PUBLISHED = "hollow: one seed, patients alone", "published"


@dataclass(frozen=True)
class Point:
    """A value and its interval, in the unit of the axis.

    published: the paper's value, if it has one
    seeds: whether the interval reckons with the seeds; if not, the point is hollow
    kind: a key of MARKS
    """

    label: str
    value: float
    low: float
    high: float
    published: float | None = None
    seeds: bool = True
    kind: str = "rows"


def interval_figure(groups: Mapping[str, Sequence[Point]], xlabel: str) -> Figure:
    """Values one below the other, in groups whose names stand to the right.

    groups: name (a data model) -> its points (classifiers)
    """
    count = sum(map(len, groups.values()))
    figure = Figure(figsize=(7, 1.1 + 0.24 * (count + len(groups))), layout="constrained")
    axes = figure.subplots()
    heights, middles, y = [], [], 0.0
    for points in groups.values():
        if heights:
            axes.axhline(y, color="0.85", linewidth=0.8)
        heights += [y + 1 + n for n in range(len(points))]
        middles.append(y + (1 + len(points)) / 2)
        y += 1 + len(points)
    points = [point for group in groups.values() for point in group]
    _draw(axes, heights, points, xlabel)
    axes.set_yticks(heights, [point.label for point in points], fontsize=8)
    axes.set_ylim(y, 0)
    _right_labels(axes, middles, list(groups), fontsize=9, fontweight="bold")
    _legend(figure, axes)
    return figure


def forest_figure(points: Sequence[Point], xlabel: str) -> Figure:
    """Differences one below the other, around a line at zero, their numbers to the right.

    points: labels may have two lines
    """
    figure = Figure(figsize=(6.4, 1.1 + 0.4 * len(points)), layout="constrained")
    axes = figure.subplots()
    axes.axvline(0, color="0.3", linewidth=1)
    heights = list(range(1, len(points) + 1))
    _draw(axes, heights, points, xlabel)
    axes.set_yticks(heights, [point.label for point in points], fontsize=8)
    axes.set_ylim(len(points) + 0.6, 0.4)
    numbers = [f"{point.value:+.1f} ({point.low:+.1f} to {point.high:+.1f})" for point in points]
    _right_labels(axes, heights, numbers, fontsize=8)
    _legend(figure, axes)
    return figure


def _draw(axes: Axes, heights: Sequence[float], points: Sequence[Point], xlabel: str) -> None:
    """The points with their intervals, and the published values as open diamonds."""
    for y, point in zip(heights, points):
        colour, marker = MARKS[point.kind]
        ends = [[point.value - point.low], [point.high - point.value]]
        look = {"color": colour, "ms": 5, "lw": 1.4, "mfc": colour if point.seeds else "white"}
        axes.errorbar(point.value, y, xerr=ends, fmt=marker, label=LEGEND[point.kind], **look)
        if not point.seeds:
            axes.plot([], [], "o", color="0.3", mfc="white", ms=5, label=ONE_SEED)
        if point.published is not None and not np.isnan(point.published):
            axes.plot(point.published, y, "D", mfc="none", mec="black", ms=5, mew=1.3, label=PUBLISHED)
    axes.set_xlabel(xlabel)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", color="0.9")
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)


def _right_labels(axes: Axes, heights: Sequence[float], labels: Sequence[str], **font: object) -> None:
    names = axes.secondary_yaxis("right")
    names.set_yticks(heights, labels, **font)
    names.tick_params(length=0)
    names.spines[:].set_visible(False)


def _legend(figure: Figure, axes: Axes) -> None:
    """Above the axes, each kind once, in the order of LEGEND."""
    handles = dict(zip(*reversed(axes.get_legend_handles_labels())))
    order = [label for label in (*LEGEND.values(), ONE_SEED, PUBLISHED) if label in handles]
    handles = {label: handles[label] for label in order}
    figure.legend(
        handles.values(),
        handles.keys(),
        loc="outside upper center",
        ncols=min(len(order), 3),
        frameon=False,
        fontsize=8,
    )
