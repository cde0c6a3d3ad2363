"""The figures: image sheets, confusion matrices, t-SNE panels, losses. Equal input gives equal PNG
bytes.

Each function returns a matplotlib Figure made without pyplot, so that nothing global is touched;
`save` writes it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from sklearn.manifold import TSNE
from sklearn.preprocessing import minmax_scale

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


def _grid(
    size: tuple[float, float],
    shape: tuple[int, int],
    row_labels: Sequence[str],
    column_labels: Sequence[str],
) -> tuple[Figure, np.ndarray]:
    """A figure of so many inches, and its axes, (rows, columns), with a label before each row and
    above each column."""
    figure = Figure(figsize=size, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.02, h_pad=0.02, wspace=0, hspace=0)
    grid = figure.subplots(*shape, squeeze=False)
    for axes, label in zip(grid[0], column_labels):
        axes.set_title(label, fontsize=9)
    for axes, label in zip(grid[:, 0], row_labels):
        axes.set_ylabel(label, fontsize=9, rotation=0, ha="right", va="center", labelpad=8)
    return figure, grid


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
    shape = len(rows), max(map(len, rows))
    figure, grid = _grid((cell * shape[1], cell * shape[0]), shape, row_labels, column_labels)
    for axes in grid.flat:
        # square cells keep the labels in line whatever the images' shapes
        axes.set(xticks=[], yticks=[], adjustable="datalim", box_aspect=1)
        axes.spines[:].set_visible(False)
    for line, row in zip(grid, rows):
        for axes, image in zip(line, row):
            if image is not None:
                axes.imshow(np.asarray(image), cmap="gray", vmin=0, vmax=255)
    return figure


def first_images_figure(images: Mapping[str, Mapping[str, Sequence[object]]]) -> Figure:
    """A column for each prompt, and for each sampler a row of its first image of each, one of its
    second, ..

    images: sampler -> prompt or plane -> images as for `contact_sheet`, equally many everywhere
    """
    rows, labels = [], []
    for sampler, columns in images.items():
        found = list(zip(*columns.values()))
        rows += found
        labels += [sampler] + [""] * (len(found) - 1)
    return contact_sheet(rows, labels, list(columns))


def confusion_figure(
    matrices: Mapping[tuple[str, str], np.ndarray], classes: Sequence[str], percent: bool = False
) -> Figure:
    """Confusion matrices in a grid, the share of each row (a true class) as shade.

    matrices: (label of the row, title of the column) -> (K, K) counts, row = target, column =
        prediction; one left out leaves its place empty
    classes: names of the K classes; one that no target has is left out of the matrices' rows
    percent: numbers are shares of a row; else counts
    """
    rows, columns = (list(dict.fromkeys(names)) for names in zip(*matrices))
    size = 1.7 + 1.75 * len(columns), 1.2 + 1.5 * len(rows)
    figure, grid = _grid(size, (len(rows), len(columns)), rows, columns)
    seen = sum(matrix.sum(axis=1) for matrix in matrices.values()) > 0
    for (i, j), axes in np.ndenumerate(grid):
        axes.tick_params(length=0, labelsize=7)
        axes.set_xticks(range(len(classes)), classes, rotation=90)
        axes.set_yticks(range(seen.sum()), np.array(classes)[seen])
        axes.spines[:].set_visible(False)
        axes.set(xlim=(-0.5, len(classes) - 0.5), ylim=(seen.sum() - 0.5, -0.5), aspect="equal")
        axes.label_outer()
        if (rows[i], columns[j]) not in matrices:
            continue
        counts = matrices[rows[i], columns[j]][seen]
        share = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
        axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
        for (y, x), value in np.ndenumerate(share):
            text = f"{100 * value:.0f}" if percent else str(counts[y, x])
            colour = "white" if value > 0.6 else "black"
            axes.text(x, y, text, ha="center", va="center", fontsize=7, color=colour)
    figure.supxlabel("prediction", fontsize=9)
    return figure


Points = tuple[np.ndarray, Sequence[str]]
"""(N, 2) in [0, 1], and the source of each point: a key of SOURCES."""


def tsne_grid(rows: Mapping[str, Mapping[str, Points]]) -> Figure:
    """Figure 3: scatter plots in a grid, points marked by where the image comes from.

    rows: row label, such as "r = 8" -> column title, a plane -> its points; every row has the same
        columns
    """
    titles = list(next(iter(rows.values())))
    size = max(2.3 * len(titles), 5), 2.2 * len(rows) + 1.0
    figure, grid = _grid(size, (len(rows), len(titles)), list(rows), titles)
    for line, panels in zip(grid, rows.values()):
        for axes, (points, sources) in zip(line, panels.values()):
            for source, (colour, marker) in SOURCES.items():
                chosen = points[np.array(sources) == source]
                look = {"color": colour, "marker": marker, "label": source, "linewidths": 0}
                if len(chosen):
                    axes.scatter(*chosen.T, s=16, alpha=0.8, **look)
            ends, ticks = (-0.04, 1.04), (0, 0.5, 1)
            axes.set(xlim=ends, ylim=ends, xticks=ticks, yticks=ticks, box_aspect=1)
            axes.label_outer()
    _legend(figure, fontsize=10)
    return figure


def _legend(figure: Figure, **look: object) -> None:
    """Above the axes, each label once."""
    labels = {}
    for axes in figure.axes:
        for handle, label in zip(*axes.get_legend_handles_labels()):
            labels.setdefault(label, handle)
    place = {"loc": "outside upper center", "ncols": 3, "frameon": False}
    figure.legend(labels.values(), labels.keys(), **place, **look)


def loss_figure(losses: Mapping[str, Sequence[tuple[int, float]]], xlabel: str) -> Figure:
    """Curves over epochs or steps, labelled in a legend above the axes; a label without values is
    left out.

    losses: label -> (epoch or step, loss) pairs; at most as many labels as LINES has colours
    """
    figure = Figure(figsize=(6, 3.2), layout="constrained")
    axes = figure.subplots()
    for colour, (label, values) in zip(LINES, losses.items()):
        if values:
            axes.plot(*zip(*values), color=colour, label=label)
    axes.set(xlabel=xlabel, ylabel="loss")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.spines[["top", "right"]].set_visible(False)
    _legend(figure)
    return figure


MARKS: dict[str, tuple[str, str, str]] = {
    "synthetic": (LINES[0], "o", "synthetic images"),
    "real": (LINES[1], "s", "real images alone"),
    "both": (LINES[2], "^", "synthetic against real"),
}
"""Colour, shape and legend of each kind of difference: what synthetic images add; what real ones
alone do; one against the other."""


@dataclass(frozen=True)
class Point:
    """A value and its interval, in the unit of the axis.

    kind: a key of MARKS
    """

    label: str
    value: float
    low: float
    high: float
    kind: str = "synthetic"


def forest_figure(points: Sequence[Point], xlabel: str) -> Figure:
    """Differences one below the other, around a line at zero, their numbers to the right.

    points: labels may have two lines
    """
    figure = Figure(figsize=(6.4, 1.1 + 0.4 * len(points)), layout="constrained")
    axes = figure.subplots()
    axes.axvline(0, color="0.3", linewidth=1)
    beside = axes.get_yaxis_transform()
    for y, point in enumerate(points):
        numbers = f"{point.value:+.1f} ({point.low:+.1f} to {point.high:+.1f})"
        axes.text(1.02, y, numbers, transform=beside, va="center", fontsize=8)
        colour, marker, label = MARKS[point.kind]
        ends = [[point.value - point.low], [point.high - point.value]]
        look = {"color": colour, "ms": 5, "lw": 1.4, "label": label}
        axes.errorbar(point.value, y, xerr=ends, fmt=marker, **look)
    axes.set_yticks(range(len(points)), [point.label for point in points], fontsize=8)
    axes.set(xlabel=xlabel, ylim=(len(points) - 0.4, -0.6))
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", color="0.9")
    axes.spines[["top", "right", "left"]].set_visible(False)
    _legend(figure, fontsize=8)
    return figure


def tsne(features: np.ndarray, seed: int = 0) -> np.ndarray:
    """Two-dimensional embedding of features, (N, 2), each axis scaled to [0, 1].

    features: (N, D) of at least four images
    The perplexity is 30, but at most (N - 1) / 3, since a point is compared with about three times
    as many neighbours.
    """
    perplexity = min(30.0, (len(features) - 1) / 3)
    embedding = TSNE(perplexity=perplexity, init="pca", random_state=seed)
    return minmax_scale(embedding.fit_transform(features))
