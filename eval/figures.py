"""The figures: image sheets, confusion matrices, t-SNE panels, losses. Equal input gives equal PNG
bytes.

Each function returns a matplotlib Figure made without pyplot, so that nothing global is touched;
`save` writes it. Labels may be of any length and script: long ones are broken into lines for which
there is room, and where matplotlib's own font lacks a letter, another installed font draws it.
"""

import logging
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import chain
from pathlib import Path
from textwrap import wrap

import numpy as np
from matplotlib.figure import Figure
from matplotlib.font_manager import findSystemFonts, fontManager, get_font
from matplotlib.text import Text
from sklearn.manifold import TSNE
from sklearn.preprocessing import minmax_scale

from harness.files import whole_file

# Okabe and Ito's palette, which stays apart under every common colour blindness; shapes differ as
# well.
SOURCES = {
    "spain": ("#0072B2", "o"),
    "africa": ("#D55E00", "s"),
    "synthetic": ("#009E73", "^"),
    "source": ("#0072B2", "o"),
    "target": ("#D55E00", "s"),
}
LETTER = 0.6  # of a letter's size is its width, about
LINES = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442")


def save(figure: Figure, path: Path, dpi: int = 150) -> str:
    """Write a PNG without matplotlib's version in it.

    Letters that no installed font has are drawn as boxes. Returns the sentence that says so, ""
    mostly, and says it.
    """
    for text in figure.findobj(Text):
        text.set_parse_math(False)  # a class may be called so: $x_1$
    labels = [text for text in figure.findobj(Text) if not text.get_text().isascii()]
    fonts, lacking = _fonts(frozenset("".join(label.get_text() for label in labels)))
    for label in labels:
        label.set(fontfamily=fonts)
    if lacking:
        lacking = f"boxes in figures are letters that no installed font has: {lacking}"
        warnings.warn(lacking, stacklevel=1)
    look = {"bbox_inches": "tight", "pad_inches": 0.05, "metadata": {"Software": None}}
    with warnings.catch_warnings(), whole_file(path) as part:
        warnings.filterwarnings("ignore", "Glyph")  # matplotlib's own line for each letter
        figure.savefig(part, dpi=dpi, format="png", **look)
    return lacking


@cache
def _fonts(letters: frozenset[str]) -> tuple[list[str], str]:
    """Font families that together draw these letters, matplotlib's own first, and the letters that
    none has."""
    families, left = ["DejaVu Sans"], {*filter(str.isprintable, letters)}
    for path in [fontManager.findfont(families[0]), *sorted(findSystemFonts())]:
        try:
            font = get_font(path)
        except (OSError, RuntimeError):  # no outlines, such as coloured pictures
            continue
        if found := left & {*map(chr, font.get_charmap())}:
            left -= found
            fontManager.addfont(path)
            # it says of a font without a normal weight that it takes another
            logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)
            families.append(font.family_name)
        if not left:
            break
    return families, "".join(sorted(left))


def _lines(labels: Iterable[str], inches: float, size: float = 9) -> list[str]:
    """The labels, broken into lines that are so long at most. size: of the letters, in points."""
    letters = int(inches * 72 / LETTER / size)
    parts = ([wrap(part, letters // _wide(part)) for part in label.split("\n")] for label in labels)
    return ["\n".join(chain(*lines)) for lines in parts]


def _size(labels: Iterable[str], size: float = 9) -> tuple[float, float]:
    """About the width and the height of the largest of these labels, in inches."""
    lines = [label.split("\n") for label in labels] or [[""]]
    width = max(len(line) * _wide(line) for line in chain(*lines))
    return width * LETTER * size / 72, max(map(len, lines)) * 1.3 * size / 72


def _wide(text: str) -> int:
    """How wide letters may be: Chinese ones are as wide as two others."""
    return 1 + (max(text, default="") > "\u2e80")


def _grid(
    cell: tuple[float, float],
    shape: tuple[int, int],
    row_labels: Sequence[str],
    column_labels: Sequence[str],
    beside: tuple[float, float] = (0, 0),
) -> tuple[Figure, np.ndarray]:
    """A figure and its axes, (rows, columns), with a label before each row and a title above each
    column, or above each cell where there are so many.

    cell: width and height of one, in inches; beside: of what else stands left and below
    """
    rows, titles = _lines(row_labels, 2), _lines(column_labels, cell[0])
    titled = -(-len(titles) // shape[1])  # rows
    margins = beside[0] + _size(rows)[0], beside[1] + titled * _size(titles)[1]
    size = np.multiply(cell, shape[::-1]) + margins
    figure = Figure(figsize=size, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.02, h_pad=0.02, wspace=0, hspace=0)
    grid = figure.subplots(*shape, squeeze=False)
    for axes, label in zip(grid.flat, titles):
        axes.set_title(label, fontsize=9)
    for axes, label in zip(grid[:, 0], rows):
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
    figure, grid = _grid((cell, cell), shape, row_labels, column_labels)
    for axes in grid.flat:
        # square cells keep the labels in line whatever the images' shapes
        axes.set(xticks=[], yticks=[], adjustable="datalim", box_aspect=1)
        axes.spines[:].set_visible(False)
    for line, row in zip(grid, rows):
        for axes, image in zip(line, row):
            if image is not None:
                axes.imshow(np.asarray(image), cmap="gray", vmin=0, vmax=255)
    return figure


def labelled_sheet(images: Sequence[object], labels: Sequence[str]) -> Figure:
    """Images as for `contact_sheet`, five in a row, each below a label of its own."""
    rows = [images[n : n + 5] for n in range(0, len(images), 5)]
    return contact_sheet(rows, column_labels=labels)


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
    shape, names = (len(rows), len(columns)), _lines(classes, 1.4, 7)
    wide, high = _size(names, 7)
    side = max(1.5, len(classes) * high)
    figure, grid = _grid((side + 0.25, side), shape, rows, columns, (wide + 0.5, wide + 0.5))
    seen = sum(matrix.sum(axis=1) for matrix in matrices.values()) > 0
    for (i, j), axes in np.ndenumerate(grid):
        axes.tick_params(length=0, labelsize=7)
        axes.set_xticks(range(len(names)), names, rotation=90)
        axes.set_yticks(range(seen.sum()), np.array(names)[seen])
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


def tsne_grid(rows: Mapping[str, Mapping[str, Points]], names: Mapping[str, str]) -> Figure:
    """Figure 3: scatter plots in a grid, points marked by where the image comes from.

    rows: row label, such as "r = 8" -> column title, a plane -> its points; every row has the same
        columns
    names: source -> what the legend calls it, if otherwise
    """
    titles = list(next(iter(rows.values())))
    cell, shape = (max(2.3, 5 / len(titles)), 2.2), (len(rows), len(titles))
    figure, grid = _grid(cell, shape, list(rows), titles, (0, 1))
    for line, panels in zip(grid, rows.values()):
        for axes, (points, sources) in zip(line, panels.values()):
            for source, (colour, marker) in SOURCES.items():
                chosen = points[np.array(sources) == source]
                look = {"color": colour, "marker": marker, "linewidths": 0}
                look["label"] = names.get(source, source)
                if len(chosen):
                    axes.scatter(*chosen.T, s=16, alpha=0.8, **look)
            ends, ticks = (-0.04, 1.04), (0, 0.5, 1)
            axes.set(xlim=ends, ylim=ends, xticks=ticks, yticks=ticks, box_aspect=1)
            axes.label_outer()
    _legend(figure)
    return figure


def _legend(figure: Figure) -> None:
    """Above the axes, each label once."""
    labels = {}
    for axes in figure.axes:
        labels |= dict(zip(*reversed(axes.get_legend_handles_labels())))
    texts = _lines(labels, figure.get_figwidth() / 4)
    place = {"loc": "outside upper center", "ncols": 3, "frameon": False, "fontsize": 9}
    figure.legend(labels.values(), texts, **place)


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


MARKS = {
    "synthetic": (LINES[0], "o", "synthetic images"),
    "real": (LINES[1], "s", "real images alone"),
}
"""Colour, shape and legend of each kind of difference: what synthetic images add; what real ones
alone do."""


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

    points: labels may have several lines
    """
    names = _lines([point.label for point in points], 3.2, 8)
    wide, high = _size(names, 8)
    size = 4.4 + wide, 1.1 + (high + 0.12) * len(points)
    figure = Figure(figsize=size, layout="constrained")
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
    axes.set_yticks(range(len(points)), names, fontsize=8)
    axes.set(xlabel=xlabel, ylim=(len(points) - 0.4, -0.6))
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", color="0.9")
    axes.spines[["top", "right", "left"]].set_visible(False)
    _legend(figure)
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
