"""t-SNE and the figures: what is drawn where, that no labels overlap, and that equal input gives
equal files."""

import warnings

import numpy as np
import pytest
from matplotlib import get_data_path
from matplotlib.colors import to_hex
from matplotlib.text import Text
from PIL import Image

from eval.figures import (
    MARKS,
    SOURCES,
    Point,
    _fonts,
    confusion_figure,
    contact_sheet,
    forest_figure,
    labelled_sheet,
    loss_figure,
    save,
    tsne,
    tsne_grid,
)

LONG = [
    "well differentiated adenocarcinoma, low-grade",
    "a_name_without_any_blank_of_forty_letters",
]
LONG += ["hyperplastic polyp", "正常组织", "кость"]
CLASSES = ["abdomen", "brain", "femur", "thorax", "other"]
MATRIX = np.array(
    [[37, 0, 2, 1, 25], [0, 64, 0, 0, 1], [0, 0, 53, 0, 11], [0, 1, 1, 29, 8], [0, 0, 0, 0, 0]]
)
RNG = np.random.default_rng(0)
GREY, COLOUR = RNG.integers(0, 255, (20, 30)), RNG.integers(0, 255, (30, 20, 3))


def grid():
    keys = [(data, name) for data in ("ES+DA", "HB+DA") for name in ("DenseNet169", "ResNet18")]
    return confusion_figure(dict.fromkeys(keys[:3], MATRIX), CLASSES, percent=True)


def ranks(sources=("spain",) * 5 + ("africa",) * 4 + ("synthetic",) * 3):
    points = np.random.default_rng(0).random((len(sources), 2))
    panels = dict.fromkeys(CLASSES[:4], (points, sources))
    return tsne_grid({f"r = {r}": panels for r in (8, 32, 128)}, {})


def forest():
    points = [
        Point("synthetic images\nHB+DA − ES+DA", 6.1, 2.4, 9.8),
        Point("contrast\nES+DA+contrast − ES+DA", 13.8, 11.2, 16.4, kind="real"),
        Point("one against\nthe other", -7.7, -12.0, 0.1, "real"),
    ]
    return forest_figure(points, "difference in accuracy, points")


DRAWN = {
    "sheet": lambda: contact_sheet(
        [[GREY, COLOUR, GREY], [COLOUR, None]], ["real", "with LoRA"], CLASSES[:3]
    ),
    "confusion": lambda: confusion_figure({("", "233 test images"): MATRIX}, CLASSES),
    "grid": grid,
    "tsne": ranks,
    "losses": lambda: loss_figure({"ES": [(1, 3.0), (2, 2.0)], "HB": [(4, 2.5)], "-": []}, "step"),
    "forest": forest,
    "long sheet": lambda: contact_sheet([[GREY] * 5], [" ".join(LONG)], LONG),
    "errors": lambda: labelled_sheet(
        [COLOUR] * 7, [f"said {a}\nis {b}" for a in LONG for b in LONG[:2]]
    ),
    "long confusion": lambda: confusion_figure({(" ".join(LONG), LONG[0]): MATRIX.T}, LONG),
    "long tsne": lambda: tsne_grid(
        {"r": dict.fromkeys(LONG, (np.eye(2), ("source", "target")))},
        {"source": LONG[0], "target": LONG[1]},
    ),
    "long forest": lambda: forest_figure(
        [Point(f"{a}\nagainst {LONG[0]}", 1, 0, 2) for a in LONG], "points"
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("draw", DRAWN.values(), ids=DRAWN)
def test_a_figure_is_the_same_file_every_time_with_labels_that_do_not_overlap(draw, tmp_path):
    figure = draw()
    save(figure, tmp_path / "a.png")
    save(draw(), tmp_path / "b.png")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    with Image.open(tmp_path / "a.png") as image:
        assert set(image.info) <= {"dpi"}
        pixels = np.asarray(image.convert("L"))
    edges = pixels[:3], pixels[-3:], pixels[:, :3], pixels[:, -3:]
    assert all((edge == 255).all() for edge in edges)  # nothing is cut

    figure.draw_without_rendering()
    beyond = set()  # matplotlib keeps ticks beyond the ends of an axis
    for axis in (axis for axes in figure.axes for axis in (axes.xaxis, axes.yaxis)):
        low, high = sorted(axis.get_view_interval())
        ticks = axis.get_major_ticks()
        beyond |= {tick.label1 for tick in ticks if not low <= tick.get_loc() <= high}
    texts = [text for text in figure.findobj(Text) if text.get_text() and text.get_visible()]
    boxes = [text.get_window_extent() for text in texts if text not in beyond]
    assert len(boxes) >= 4
    for n, box in enumerate(boxes):
        assert not any(box.overlaps(other) for other in boxes[:n]), texts[n]


@pytest.mark.parametrize("fonts, lacking", [([], "ᶁᶄ"), (["STIXGeneral"], "")])
def test_letters_are_drawn_by_another_font_or_one_line_says_which_are_boxes(
    fonts, lacking, tmp_path, monkeypatch
):
    paths = [f"{get_data_path()}/fonts/ttf/{name}.ttf" for name in fonts]
    monkeypatch.setattr("eval.figures.findSystemFonts", lambda: paths)
    _fonts.cache_clear()
    figure = confusion_figure({("", "of ᶁᶄ"): MATRIX[:2, :2]}, ["ᶁᶄ", "кость"])
    line = f"boxes in figures are letters that no installed font has: {lacking}" * bool(lacking)
    with warnings.catch_warnings(record=True, action="always") as said:  # of glyphs, none
        assert save(figure, tmp_path / "a.png") == line
    assert [str(warning.message) for warning in said] == [line] * bool(line)
    for text in (figure.axes[0].title, figure.axes[0].get_xticklabels()[0]):
        assert text.get_fontfamily()[2:] == fonts and text.get_text().endswith("ᶁᶄ")


def test_confusion_matrices_show_counts_or_shares_of_the_classes_that_occur():
    axes = DRAWN["confusion"]().axes[0]
    counts = {text.get_position(): text.get_text() for text in axes.texts}
    assert counts == {(j, i): str(MATRIX[i, j]) for i in range(4) for j in range(5)}
    np.testing.assert_allclose(axes.images[0].get_array()[0], MATRIX[0] / 65)
    axes = grid().axes
    shown = {text.get_position(): text.get_text() for text in axes[0].texts}
    assert len(shown) == 4 * 5 and (shown[0, 0], shown[4, 0], shown[1, 1]) == ("57", "38", "98")
    assert not axes[3].texts and not axes[3].images  # the place of one left out stays empty
    assert [a.get_title() for a in axes] == ["DenseNet169", "ResNet18", "", ""]
    assert [a.get_ylabel() for a in axes] == ["ES+DA", "", "HB+DA", ""]


def test_sheets_put_images_and_labels_where_they_belong():
    axes = DRAWN["sheet"]().axes
    assert [a.get_title() for a in axes] == [*CLASSES[:3], "", "", ""]
    assert [a.get_ylabel() for a in axes] == ["real", "", "", "with LoRA", "", ""]
    assert [len(a.images) for a in axes] == [1, 1, 1, 1, 0, 0]
    assert axes[0].images[0].get_clim() == (0, 255)  # not stretched to each image's own range
    axes = labelled_sheet([GREY] * 6, [*"abcdef"]).axes
    assert [a.get_title() for a in axes] == [*"abcdef", *[""] * 4]


@pytest.mark.slow
def test_a_source_has_its_colour_and_shape_whatever_else_is_drawn():
    axes = ranks().axes
    assert len(axes) == 12 and [a.get_title() for a in axes[:4]] == CLASSES[:4]
    assert [a.get_ylabel() for a in axes[::4]] == ["r = 8", "r = 32", "r = 128"]
    assert [len(mark.get_offsets()) for mark in axes[0].collections] == [5, 4, 3]
    for figure, names in (
        (ranks(), ("spain", "africa", "synthetic")),
        (ranks(["africa"]), ["africa"]),
    ):
        marks = figure.axes[0].collections
        colours = [to_hex(mark.get_facecolor()[0]).upper() for mark in marks]
        assert colours == [SOURCES[name][0] for name in names]


def test_the_forest_has_intervals_a_mark_for_each_kind_and_its_numbers_beside_it():
    figure = forest()
    axes = figure.axes[0]
    lines = [container.lines for container in axes.containers]
    ends = [bars.get_segments()[0].tolist() for _, _, (bars,) in lines]
    expected = (2.4, 0), (9.8, 0), (11.2, 1), (16.4, 1), (-12, 2), (0.1, 2)
    np.testing.assert_allclose(np.reshape(ends, (6, 2)), expected)
    assert [mark.get_xdata()[0] for mark, *_ in lines] == [6.1, 13.8, -7.7]
    marks = [(mark.get_color(), mark.get_marker()) for mark, *_ in lines]
    assert marks == [MARKS[kind][:2] for kind in ("synthetic", "real", "real")]
    texts = [text.get_text() for text in figure.findobj(Text)]
    assert "+6.1 (+2.4 to +9.8)" in texts and "-7.7 (-12.0 to +0.1)" in texts


def test_a_loss_curve_starts_at_one_and_one_without_values_is_left_out():
    lines = DRAWN["losses"]().axes[0].lines
    found = [(line.get_xdata().tolist(), line.get_ydata().tolist()) for line in lines]
    assert found == [([1, 2], [3.0, 2.0]), ([4], [2.5])]


@pytest.mark.slow
def test_tsne_keeps_clusters_apart_fills_the_unit_square_and_is_a_function_of_its_seed():
    x = np.repeat(np.eye(3, 20) * 30, 20, axis=0) + np.random.default_rng(0).normal(size=(60, 20))
    points = tsne(x, seed=1)
    assert [*points.min(axis=0), *points.max(axis=0)] == pytest.approx([0, 0, 1, 1], abs=1e-6)
    centres = points.reshape(3, 20, 2).mean(axis=1)
    nearest = np.linalg.norm(points[:, None] - centres, axis=2).argmin(axis=1)
    assert (nearest == np.arange(60) // 20).all()
    assert np.array_equal(tsne(x[:12], 3), tsne(x[:12], 3))  # fewer than the perplexity
    assert tsne(x[:4]).shape == (4, 2)
