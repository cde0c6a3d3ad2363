"""Features, t-SNE and the figures: what is measured, how it is drawn, and that equal input gives
equal files."""

import numpy as np
import pytest
import torch
import torchvision.models as tv
from matplotlib.colors import to_hex
from matplotlib.text import Text
from PIL import Image
from torch import nn

from classify import ClassifyError
from classify.data import PlaneImages, prepare
from classify.features import Extractor, classifier, features, inception
from classify.models import build, save
from eval import figures, forest
from eval.figures import MARKS, Point, tsne
from planes import PLANES
from planes.datasets import Record

pytestmark = pytest.mark.slow

CLASSES = [str(plane) for plane in PLANES]


def noise_records(folder, count):
    rng = np.random.default_rng(0)
    records = []
    for n in range(count):
        Image.fromarray(rng.integers(0, 255, (40, 50), dtype=np.uint8)).save(folder / f"{n}.png")
        records.append(Record(folder / f"{n}.png", PLANES[n % 5], str(n), True, "spain", "Spain"))
    return records


# --- features ---


def test_features_of_our_own_classifier_are_what_enters_its_head(tmp_path):
    model = build("mobilenet_v2", "none", 64).eval()
    save(
        tmp_path / "model.safetensors",
        model,
        {"model": "mobilenet_v2", "size": 64, "input_range": "minus-one-one"},
    )
    records = noise_records(tmp_path, 5)
    x = prepare(torch.stack([PlaneImages(records, 64)[n][0] for n in range(5)]), "minus-one-one")
    with torch.no_grad():
        pooled, logits = model.features(x).mean(dim=(2, 3)), model(x)

    extractor = classifier(tmp_path / "model.safetensors")
    assert extractor.name == "mobilenet_v2 trained on the planes, penultimate layer"
    found = features(extractor, records, batch_size=2)
    assert found.shape == (5, 1280) and found.dtype == np.float32
    np.testing.assert_allclose(found, pooled, atol=1e-4 * pooled.abs().max(), rtol=0)
    found = features(classifier(tmp_path / "model.safetensors", "logits"), records, batch_size=3)
    np.testing.assert_allclose(found, logits, atol=1e-4 * logits.abs().max(), rtol=0)


def test_taking_features_leaves_no_hook_behind(tmp_path):
    model = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 2)).eval()
    extractor = Extractor(model, 16, "zero-one", "penultimate", "means")
    found = features(extractor, noise_records(tmp_path, 3))
    assert found.shape == (3, 3) and 0.4 < found.mean() < 0.6
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize(("layer", "width"), [("logits", 1000), ("penultimate", 2048)])
def test_inception_gives_logits_or_pooled_features(tmp_path, layer, width):
    torch.manual_seed(0)
    torch.save(
        tv.inception_v3(weights=None, init_weights=False).state_dict(), tmp_path / "inception.pth"
    )
    extractor = inception(tmp_path / "inception.pth", layer, size=96)
    assert features(extractor, noise_records(tmp_path, 2)).shape == (2, width)
    assert str(width) in extractor.name and "Inception v3" in extractor.name
    assert extractor.model.transform_input and not extractor.model.training


def test_inception_without_weights_is_one_line_with_their_address(tmp_path, monkeypatch):
    def offline(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr("torch.hub.download_url_to_file", offline)
    monkeypatch.setattr("torch.hub.get_dir", lambda: str(tmp_path))
    with pytest.raises(ClassifyError, match="inception_v3_google") as error:
        inception()
    assert "\n" not in str(error.value)
    with pytest.raises(ClassifyError, match="no such file"):
        inception(tmp_path / "nowhere.pth")


# --- t-SNE ---


def test_tsne_keeps_clusters_apart_and_fills_the_unit_square():
    rng = np.random.default_rng(0)
    groups = np.repeat(np.eye(3, 20) * 30, 20, axis=0)
    points = tsne((groups + rng.normal(size=groups.shape)).astype(np.float32), seed=1)
    np.testing.assert_allclose(
        [points.min(axis=0), points.max(axis=0)], [[0, 0], [1, 1]], atol=1e-6
    )
    distances = np.linalg.norm(points[:, None] - points, axis=2)
    np.fill_diagonal(distances, np.inf)
    assert (distances.argmin(axis=1) // 20 == np.arange(60) // 20).all()


def test_tsne_is_a_function_of_its_seed_and_takes_few_images():
    x = np.random.default_rng(0).normal(size=(60, 600)).astype(np.float32)
    assert np.array_equal(tsne(x, seed=3), tsne(x, seed=3)) and not np.array_equal(
        tsne(x, seed=3), tsne(x, seed=4)
    )
    assert tsne(x[:12]).shape == (12, 2)  # fewer than the perplexity
    assert tsne(x[:4]).shape == (4, 2)
    with pytest.raises(ValueError, match="at least 4"):
        tsne(x[:3])


# --- figures ---

MATRIX = np.array(
    [[37, 0, 2, 1, 25], [0, 64, 0, 0, 1], [0, 0, 53, 0, 11], [0, 1, 1, 29, 8], [0, 0, 0, 0, 0]]
)


def sheet():
    rng = np.random.default_rng(0)
    grey, colour = (
        rng.integers(0, 255, (20, 30), dtype=np.uint8),
        rng.integers(0, 255, (30, 20, 3), dtype=np.uint8),
    )
    rows = [[grey, colour, Image.fromarray(grey)], [colour, None]]
    return figures.contact_sheet(rows, ["real", "with LoRA"], ["abdomen", "brain", "femur"])


def panels():
    rng = np.random.default_rng(0)
    sources = ["spain"] * 5 + ["africa"] * 4 + ["synthetic"] * 3
    panels = {plane: (rng.random((12, 2)), sources) for plane in CLASSES[:4]}
    return figures.tsne_grid({"": panels}, "t-SNE of Inception v3, 1000 logits")


def curves():
    return figures.loss_figure(
        {
            "ES": [(1, 3.0), (2, 2.0), (3, 1.5)],
            "HB + DA": [(1, 2.5), (2, 1.0), (4, 0.5)],
            "none": [],
        }
    )


def grid():
    matrices = {
        (data, name): MATRIX
        for data in ("ES+DA", "HB+DA")
        for name in ("DenseNet169", "EfficientNet b0")
    }
    del matrices["HB+DA", "EfficientNet b0"]
    return figures.confusion_grid(
        matrices, ["ES+DA", "HB+DA"], ["DenseNet169", "EfficientNet b0"], CLASSES
    )


def intervals():
    hybrid = [
        Point("EfficientNet b0", 70.0, 64.5, 75.0, 72.96),
        Point("ViT b16", 82.0, 77.0, 86.5, seeds=False),
    ]
    return forest.interval_figure(
        {"HB": hybrid, "HB-all": [Point("ViT b16", 78.0, 72.0, 83.0)]}, "accuracy, %"
    )


def gains():
    points = [
        Point("synthetic images\nHB+DA − ES+DA", 6.1, 2.4, 9.8, 11.84, kind="synthetic"),
        Point("brightness and contrast\nES+DA+contrast − ES+DA", 13.8, 11.2, 16.4, kind="real"),
        Point(
            "one against the other\nHB+DA − ES+DA+contrast",
            -7.7,
            -12.0,
            0.1,
            float("nan"),
            False,
            "both",
        ),
    ]
    return forest.forest_figure(points, "difference in accuracy, points")


def ranks():
    rng = np.random.default_rng(0)
    sources = ["spain"] * 5 + ["africa"] * 4 + ["synthetic"] * 3
    rows = {
        f"r = {r}": {plane: (rng.random((12, 2)), sources) for plane in CLASSES[:4]}
        for r in (8, 32, 128)
    }
    return figures.tsne_grid(rows, "t-SNE of Inception v3, 1000 logits")


def samples():
    rng = np.random.default_rng(0)
    image = rng.integers(0, 255, (20, 30), dtype=np.uint8)
    rows = {name: dict.fromkeys(CLASSES, image) for name in ("Euler", "UniPC", "Spain")}
    return figures.samples_figure(rows | {"Africa": dict.fromkeys(CLASSES[:4], image)})


DRAWN = {
    "sheet": sheet,
    "confusion": lambda: figures.confusion_figure(MATRIX, CLASSES, "233 test images"),
    "tsne": panels,
    "loss": curves,
    "confusion-grid": grid,
    "intervals": intervals,
    "forest": gains,
    "tsne-grid": ranks,
    "samples": samples,
}


@pytest.mark.slow
@pytest.mark.parametrize("draw", DRAWN.values(), ids=DRAWN)
def test_a_figure_is_the_same_file_every_time_and_says_nothing_of_when_or_by_what(draw, tmp_path):
    figures.save(draw(), tmp_path / "a.png")
    figures.save(draw(), tmp_path / "b.png")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    with Image.open(tmp_path / "a.png") as image:
        image.load()
        assert set(image.info) <= {"dpi"}
        assert len(np.unique(np.asarray(image.convert("L")))) > 10


def visible_texts(figure):
    """All texts that are drawn; matplotlib also keeps ticks beyond the ends of an axis."""
    beyond = set()
    for axis in (axis for axes in figure.axes for axis in (axes.xaxis, axes.yaxis)):
        low, high = sorted(axis.get_view_interval())
        beyond |= {
            tick.label1 for tick in axis.get_major_ticks() if not low <= tick.get_loc() <= high
        }
    texts = figure.findobj(Text)
    return [text for text in texts if text.get_text() and text.get_visible() and text not in beyond]


@pytest.mark.parametrize("draw", DRAWN.values(), ids=DRAWN)
def test_no_two_labels_overlap_and_none_leaves_the_figure(draw):
    figure = draw()
    figure.draw_without_rendering()
    texts = visible_texts(figure)
    boxes = [text.get_window_extent() for text in texts]
    assert len(boxes) >= 4
    for n, box in enumerate(boxes):
        assert figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1, texts[n]
        assert figure.bbox.y0 <= box.y0 and box.y1 <= figure.bbox.y1, texts[n]
        for m in range(n):
            # a slanted label's box is larger than the label
            if not (texts[n].get_rotation() % 90 or texts[m].get_rotation() % 90):
                assert not box.overlaps(boxes[m]), (texts[n], texts[m])


def test_the_confusion_figure_shows_every_count_and_shades_rows_by_share():
    axes = figures.confusion_figure(MATRIX, CLASSES).axes[0]
    counts = {text.get_position(): text.get_text() for text in axes.texts}
    assert all(counts[j, i] == str(MATRIX[i, j]) for i in range(5) for j in range(5))
    shade = axes.images[0].get_array()
    assert shade[0, 0] == pytest.approx(37 / 65) and shade[4].max() == 0
    assert (axes.get_ylabel(), axes.get_xlabel()) == ("target", "prediction")


def test_a_source_has_its_colour_and_shape_whatever_else_is_drawn():
    def marks(sources):
        points = np.linspace(0, 1, 2 * len(sources)).reshape(-1, 2)
        found = figures.tsne_grid({"": {"brain": (points, sources)}}).axes[0].collections
        return [
            (to_hex(mark.get_facecolor()[0]).upper(), len(mark.get_offsets())) for mark in found
        ]

    assert marks(["synthetic", "africa", "africa"]) == [("#D55E00", 2), ("#009E73", 1)]
    assert marks(["synthetic"]) == [("#009E73", 1)]
    # never in one figure
    paper, own = (["spain", "africa", "synthetic"], ["source", "target", "synthetic"])
    for names in (paper, own):
        assert (
            len({figures.SOURCES[name] for name in names})
            == len({figures.SOURCES[name][1] for name in names})
            == 3
        )


def test_a_contact_sheet_puts_images_and_labels_where_they_belong():
    grid = sheet().axes
    assert [axes.get_title() for axes in grid[:3]] == ["abdomen", "brain", "femur"]
    assert [grid[0].get_ylabel(), grid[3].get_ylabel()] == ["real", "with LoRA"]
    assert [len(axes.images) for axes in grid] == [1, 1, 1, 1, 0, 0]
    assert grid[0].images[0].get_clim() == (0, 255)  # not stretched to each image's own range


def test_the_confusion_grid_shows_shares_of_the_planes_that_occur_and_leaves_the_place_of_a_missing_one_empty():
    axes = grid().axes
    shown = {text.get_position(): text.get_text() for text in axes[0].texts}
    assert len(shown) == 4 * 5 and (shown[0, 0], shown[4, 0], shown[1, 1]) == ("57", "38", "98")
    assert not axes[3].texts and not axes[3].images and axes[3].get_xticks().size
    assert [a.get_title() for a in axes[:2]] == ["DenseNet169", "EfficientNet b0"]
    assert [axes[0].get_ylabel(), axes[2].get_ylabel()] == ["ES+DA", "HB+DA"]


def drawn_intervals(axes):
    """(value, low, high, height) of every point with an interval, and whether it is filled."""
    found = []
    for container in axes.containers:
        marker, _, (bars,) = container.lines
        low, high = bars.get_segments()[0][:, 0]
        filled = to_hex(marker.get_markerfacecolor()) == to_hex(marker.get_color())
        found.append((*marker.get_xdata(), low, high, *marker.get_ydata(), filled))
    return found


def published(axes):
    return [line.get_xdata().tolist() for line in axes.lines if line.get_marker() == "D"]


def test_the_interval_figure_draws_values_intervals_and_published_numbers_where_there_are_any():
    axes = intervals().axes[0]
    points = drawn_intervals(axes)
    assert [point[:3] for point in points] == [(70, 64.5, 75), (82, 77, 86.5), (78, 72, 83)]
    assert [point[3] for point in points] == axes.get_yticks().tolist()
    assert [point[4] for point in points] == [True, False, True]  # hollow: one seed
    assert published(axes) == [[72.96]]
    assert [label.get_text() for label in axes.get_yticklabels()] == [
        "EfficientNet b0",
        "ViT b16",
        "ViT b16",
    ]


def test_the_forest_has_a_line_at_zero_a_mark_for_each_kind_and_its_numbers_beside_it():
    figure = gains()
    axes = figure.axes[0]
    points = drawn_intervals(axes)
    expected = [(6.1, 2.4, 9.8), (13.8, 11.2, 16.4), (-7.7, -12, 0.1)]
    np.testing.assert_allclose([point[:3] for point in points], expected, atol=1e-12)
    assert [point[4] for point in points] == [True, True, False] and published(axes) == [[11.84]]
    assert [0, 0] in [line.get_xdata() for line in axes.lines if len(line.get_xdata()) == 2]
    marks = [(line.lines[0].get_color(), line.lines[0].get_marker()) for line in axes.containers]
    assert marks == [MARKS[kind] for kind in ("synthetic", "real", "both")]
    assert len({colour for colour, _ in marks}) == len({marker for _, marker in marks}) == 3
    texts = [text.get_text() for text in figure.findobj(Text)]
    assert "+6.1 (+2.4 to +9.8)" in texts and "-7.7 (-12.0 to +0.1)" in texts
    assert texts.count("published") == 1 and "hollow: one seed, patients alone" in texts


def test_the_rank_panel_has_a_row_for_each_rank_and_a_column_for_each_plane():
    axes = ranks().axes
    assert len(axes) == 12 and [a.get_title() for a in axes[:4]] == CLASSES[:4]
    assert [a.get_ylabel() for a in axes[::4]] == ["r = 8", "r = 32", "r = 128"]
    colours = {
        tuple(to_hex(mark.get_facecolor()[0]).upper() for mark in a.collections) for a in axes
    }
    assert colours == {tuple(figures.SOURCES[name][0] for name in ("spain", "africa", "synthetic"))}


def test_figure_two_leaves_the_plane_empty_that_africa_does_not_have():
    axes = samples().axes
    assert [a.get_title() for a in axes[:5]] == CLASSES
    assert [a.get_ylabel() for a in axes[::5]] == ["Euler", "UniPC", "Spain", "Africa"]
    assert [len(a.images) for a in axes] == [1] * 19 + [0]


def test_a_loss_curve_starts_at_one_and_more_curves_than_colours_are_refused():
    lines = curves().axes[0].lines
    assert len(lines) == 2 and lines[0].get_xdata().tolist() == [1, 2, 3]
    assert lines[1].get_xdata().tolist() == [1, 2, 4] and lines[1].get_ydata().tolist() == [
        2.5,
        1.0,
        0.5,
    ]
    with pytest.raises(ValueError, match="9 curves"):
        figures.loss_figure({str(n): [(1, 1.0)] for n in range(9)})
