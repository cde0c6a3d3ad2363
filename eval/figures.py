"""The figures: image sheets, confusion matrices, t-SNE panels, losses. Equal input gives equal PNG
bytes.

Each function returns a matplotlib Figure made without pyplot, so that nothing global is touched;
`save` writes it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from sklearn.manifold import TSNE

from planes import PLANES

# Okabe and Ito's palette, which stays apart under every common colour blindness; shapes differ as
# well.
SOURCES: dict[str, tuple[str, str]] = {
    "spain": ("#0072B2", "o"),
    "africa": ("#D55E00", "s"),
    "synthetic": ("#009E73", "^"),
    "source": ("#0072B2", "o"),
    "target": ("#D55E00", "s"),
}
LINES = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442")


def save(figure: Figure, path: Path, dpi: int = 150) -> None:
    """Write a PNG without matplotlib's version in it."""
    figure.savefig(path, dpi=dpi, format="png", metadata={"Software": None})


def contact_sheet(
    rows: Sequence[Sequence[object]],
    row_labels: Sequence[str] = (),
    column_labels: Sequence[str] = (),
    cell: float = 1.4,
) -> Figure:
    """Images in a grid, with a label before each row and above each column.

    rows: images as anything numpy takes (PIL images too), uint8, (H, W) or (H, W, 3); None leaves a
        cell empty
    cell: inches of a cell's side
    """
    columns = max(len(row) for row in rows)
    figure = Figure(figsize=(cell * columns, cell * len(rows)), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.02, h_pad=0.02, wspace=0, hspace=0)
    grid = figure.subplots(len(rows), columns, squeeze=False)
    for i, row in enumerate(rows):
        for j, axes in enumerate(grid[i]):
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set_visible(False)
            if j < len(row) and row[j] is not None:
                axes.imshow(np.asarray(row[j]), cmap="gray", vmin=0, vmax=255)
            # square cells keep the labels in line whatever the images' shapes
            axes.set_adjustable("datalim")
            axes.set_box_aspect(1)
            if i == 0 and j < len(column_labels):
                axes.set_title(column_labels[j], fontsize=9)
            if j == 0 and i < len(row_labels):
                axes.set_ylabel(
                    row_labels[i], fontsize=9, rotation=0, ha="right", va="center", labelpad=6
                )
    return figure


def samples_figure(
    rows: Mapping[str, Mapping[str, object]], classes: Sequence[str] = PLANES
) -> Figure:
    """Figure 2: a row for each sampler and each site, a column for each plane.

    rows: label, such as "UniPC" or "Africa" -> plane -> image as for `contact_sheet`; a plane left
        out stays empty
    """
    return contact_sheet(
        [[images.get(name) for name in classes] for images in rows.values()], list(rows), classes
    )


def first_images_figure(images: Mapping[str, Mapping[str, Sequence[object]]]) -> Figure:
    """A column for each prompt, and for each sampler a row of its first image of each, one of its
    second, ..

    images: sampler -> prompt or plane -> images as for `contact_sheet`, equally many everywhere
    """
    rows, labels = [], []
    for sampler, columns in images.items():
        rows += zip(*columns.values())
        labels += [sampler, *[""] * (len(next(iter(columns.values()))) - 1)]
    return contact_sheet(rows, labels, list(next(iter(images.values()))))


def confusion_figure(matrix: np.ndarray, classes: Sequence[str], title: str = "") -> Figure:
    """Confusion matrix: counts as numbers, the share of each row (a true class) as shade.

    matrix: (K, K) counts, row = target, column = prediction
    """
    matrix = np.asarray(matrix)
    share = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    figure = Figure(
        figsize=(1.6 + 0.75 * len(classes), 1.1 + 0.75 * len(classes)), layout="constrained"
    )
    axes = figure.subplots()
    axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
    for (i, j), count in np.ndenumerate(matrix):
        axes.text(
            j,
            i,
            str(count),
            ha="center",
            va="center",
            color="white" if share[i, j] > 0.5 else "black",
        )
    axes.set_xticks(range(len(classes)), classes, rotation=30, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(len(classes)), classes)
    axes.set(xlabel="prediction", ylabel="target", title=title)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    return figure


def confusion_grid(
    matrices: Mapping[tuple[str, str], np.ndarray],
    rows: Sequence[str],
    columns: Sequence[str],
    classes: Sequence[str],
) -> Figure:
    """Confusion matrices side by side: the share of each row (a true class) in percent, as number
    and as shade.

    matrices: (row, column) -> (K, K) counts, row = target, column = prediction; one left out leaves
        its place empty
    classes: names of the K classes; a class that no target has is left out of the matrices' rows
    """
    figure = Figure(
        figsize=(1.7 + 1.75 * len(columns), 1.2 + 1.5 * len(rows)), layout="constrained"
    )
    figure.get_layout_engine().set(w_pad=0.03, h_pad=0.03, wspace=0.02, hspace=0.02)
    grid = figure.subplots(len(rows), len(columns), squeeze=False)
    seen = sum(np.asarray(matrix).sum(axis=1) for matrix in matrices.values()) > 0
    present = [name for name, is_seen in zip(classes, seen) if is_seen]
    for i, j in np.ndindex(grid.shape):
        axes = grid[i, j]
        axes.set_xticks(
            range(len(classes)), classes if i == len(rows) - 1 else [], rotation=90, fontsize=7
        )
        axes.set_yticks(range(len(present)), present if j == 0 else [], fontsize=7)
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        axes.set(xlim=(-0.5, len(classes) - 0.5), ylim=(len(present) - 0.5, -0.5))
        axes.set_aspect("equal")
        if i == 0:
            axes.set_title(columns[j], fontsize=9)
        if j == 0:
            axes.set_ylabel(
                rows[i],
                fontsize=9,
                fontweight="bold",
                rotation=0,
                ha="right",
                va="center",
                labelpad=8,
            )
        if (rows[i], columns[j]) not in matrices:
            continue
        counts = np.asarray(matrices[rows[i], columns[j]])[seen]
        share = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
        axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
        for (y, x), value in np.ndenumerate(share):
            colour = "white" if value > 0.6 else "black"
            axes.text(
                x, y, f"{100 * value:.0f}", ha="center", va="center", fontsize=7, color=colour
            )
    figure.supxlabel("prediction", fontsize=9)
    return figure


Points = tuple[np.ndarray, Sequence[str]]
"""(N, 2) in [0, 1], and the source of each point: a key of SOURCES."""


def tsne_grid(rows: Mapping[str, Mapping[str, Points]], caption: str = "") -> Figure:
    """Figure 3: scatter plots in a grid, points marked by where the image comes from.

    rows: row label, such as "r = 8" -> column title, a plane -> its points; every row has the same
        columns
    caption: one line under the panels; say which features were embedded
    """
    titles = list(next(iter(rows.values())))
    figure = Figure(
        figsize=(max(2.3 * len(titles), 5), 2.2 * len(rows) + 1.0), layout="constrained"
    )
    grid = figure.subplots(len(rows), len(titles), squeeze=False)
    marks = {}
    for (label, panels), line in zip(rows.items(), grid):
        for title, axes in zip(titles, line):
            marks |= _scatter(axes, *panels[title])
        line[0].set_ylabel(label, fontsize=11)
    for title, axes in zip(titles, grid[0]):
        axes.set_title(title)
    for axes in grid.ravel():
        axes.label_outer()
    marks = {source: marks[source] for source in SOURCES if source in marks}
    figure.legend(
        marks.values(), marks.keys(), loc="outside upper center", ncols=len(marks), frameon=False
    )
    figure.supxlabel(caption, fontsize=9)
    return figure


def _scatter(axes: Axes, points: np.ndarray, sources: Sequence[str]) -> dict[str, object]:
    """Points of each source in its own colour and shape; returns what a legend needs."""
    marks = {}
    for source, (colour, marker) in SOURCES.items():
        chosen = np.asarray(points)[[name == source for name in sources]]
        if len(chosen):
            marks[source] = axes.scatter(
                *chosen.T, s=16, color=colour, marker=marker, alpha=0.8, linewidths=0
            )
    axes.set(xlim=(-0.04, 1.04), ylim=(-0.04, 1.04), xticks=[0, 0.5, 1], yticks=[0, 0.5, 1])
    axes.set_box_aspect(1)
    return marks


def loss_figure(
    losses: Mapping[str, Sequence[tuple[int, float]]], xlabel: str = "epoch", ylabel: str = "loss"
) -> Figure:
    """Curves over epochs or steps, labelled in a legend above the axes; a label without values is
    left out.

    losses: label -> (epoch, value) pairs; at most as many labels as LINES has colours
    """
    losses = {label: values for label, values in losses.items() if values}
    if len(losses) > len(LINES):
        raise ValueError(f"{len(losses)} curves, but only {len(LINES)} distinguishable colours")
    figure = Figure(figsize=(6, 3.2), layout="constrained")
    axes = figure.subplots()
    for colour, (label, values) in zip(LINES, losses.items()):
        axes.plot(
            *zip(*values), color=colour, label=label, marker="." if len(values) < 50 else None
        )
    axes.set(xlabel=xlabel, ylabel=ylabel)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper left", ncols=2, frameon=False)
    return figure


MARKS: dict[str, tuple[str, str]] = {
    "rows": (LINES[0], "o"),
    "synthetic": (LINES[0], "o"),
    "real": (LINES[1], "s"),
    "both": (LINES[2], "^"),
}
"""Colour and shape of each kind of value: a row's; what synthetic images add; what real ones alone
do; one against the other."""
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
            axes.plot(
                point.published, y, "D", mfc="none", mec="black", ms=5, mew=1.3, label=PUBLISHED
            )
    axes.set_xlabel(xlabel)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", color="0.9")
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)


def _right_labels(
    axes: Axes, heights: Sequence[float], labels: Sequence[str], **font: object
) -> None:
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


def tsne(features: np.ndarray, perplexity: float = 30.0, seed: int = 0) -> np.ndarray:
    """Two-dimensional embedding of features, each axis scaled to [0, 1].

    features: (N, D)
    perplexity: clipped to (N - 1) / 3, since a point is compared with about three times as many
    neighbours Returns (N, 2). ValueError for fewer than four images.
    """
    if len(features) < 4:
        raise ValueError(f"t-SNE needs at least 4 images, not {len(features)}")
    perplexity = min(perplexity, (len(features) - 1) / 3)
    points = TSNE(perplexity=perplexity, init="pca", random_state=seed).fit_transform(features)
    low, high = points.min(axis=0), points.max(axis=0)
    return (points - low) / np.where(high > low, high - low, 1)
