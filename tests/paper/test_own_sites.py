"""A user's own sites and classes: two folders of hardware in the place of fetuses, from images to a
report."""

import csv
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from classify.images import choose_records
from planes import PLANES
from planes.captions import prompts_beside, read_prompts, training_images
from planes.datasets import DatasetError
from planes.sites import classes_of, prompts_of, read_site

ROOT = Path(__file__).resolve().parents[2]
CLASSES = ("bolt", "hex nut", "washer")
TEMPLATE = "a photograph of a {class}"
TINY = """
import runpy, sys
from functools import partial
import paper.adapt
paper.adapt.generate = partial(paper.adapt.generate, steps=2)
script = runpy.run_path("reproduce.py", run_name="reproduce")
space = script["parse_args"].__globals__
space["QUICK"] = script["Scale"](
    per_plane={"all": None, "balanced": 23, "lora": 20},
    train_lora="--target transformer --batch-size 6",
    repeats=1,
    rank=4,
    sample="--steps 2",
    count=2,
    classify="--size 64 --batch-size 6 --workers 0",
    passes={"resnet18": 12},
)
script["main"](script["parse_args"](sys.argv[1:]))
"""


def draw(name: str, bright: int, rng: np.random.Generator) -> Image.Image:
    """A part from above, somewhere near the middle, in its site's light."""
    image = Image.fromarray(rng.integers(0, 30, (80, 80), dtype=np.uint8))
    pen, (x, y), r = ImageDraw.Draw(image), rng.integers(34, 46, 2), int(rng.integers(16, 26))
    if name == "bolt":
        pen.rectangle((x - r // 3, y - r, x + r // 3, y + r), fill=bright)
        pen.ellipse((x - r // 2, y - r - 6, x + r // 2, y - r + 6), fill=bright)
    elif name == "hex nut":
        pen.regular_polygon((int(x), int(y), r), 6, rotation=int(rng.integers(60)), fill=bright)
        pen.ellipse((x - r // 2, y - r // 2, x + r // 2, y + r // 2), fill=0)
    else:
        pen.ellipse((x - r, y - r, x + r, y + r), outline=bright, width=5)
    return image


def write_site(root: Path, counts: dict[str, int], bright: int, seed: int) -> Path:
    rng = np.random.default_rng(seed)
    for name, count in counts.items():
        (root / name).mkdir(parents=True)
        for n in range(count):
            draw(name, bright, rng).save(root / name / f"{n}.png")
    return root


@pytest.fixture(scope="module")
def sites(tmp_path_factory):
    """A workshop with more washers than bolts, and a dimmer shed without washers."""
    root = tmp_path_factory.mktemp("sites")
    shop = write_site(root / "workshop", dict(zip(CLASSES, (3, 4, 8))), 240, seed=0)
    return shop, write_site(root / "shed", {"bolt": 3, "hex nut": 3}, 120, seed=1)


@pytest.mark.slow
def test_two_folders_of_another_domain_become_a_report_by_one_command(sites, tmp_path):
    shop, shed = sites
    out = tmp_path / "run"
    flags = [
        "--quick",
        "--seeds",
        "0",
        "--device",
        "cpu",
        "--source",
        shop,
        "--target",
        shed,
        "--out",
        out,
    ]
    flags += ["--probe", "probe:mobilenet_v2", "knn:mobilenet_v2"]  # frozen, and of random weights
    command = [sys.executable, "-c", TINY, *map(str, flags), "--prompt-template", TEMPLATE]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1200
    )
    assert done.returncode == 0, done.stderr[-2000:]
    report = (out / "report.md").read_text(encoding="utf-8")
    said = report + (out / "results.csv").read_text(encoding="utf-8")
    assert not re.search(
        r"fetal|fetus|abdomen|thorax|spanish|spain|africa|phantom|published", said, re.IGNORECASE
    )
    assert "FU-LoRA from workshop to shed" in report and "Target has no washer" in report
    assert all(name in report for name in ("bolt", "hex nut"))
    assert {"samples.png", "sources.png", "gain.png"} <= {
        path.name for path in (out / "figures").iterdir()
    }

    assert "Frozen vision models" in report and "less it" in report
    assert all(
        f"mobilenet_v2 ({what})" in report for what in ("linear probe", "nearest neighbours")
    )
    # ES and HB, each twice
    assert len([*(out / "rows").glob("*/*_mobilenet_v2/seed0/metrics.json")]) == 4
    assert "left out, as the second site has no training images" in done.stdout

    assert json.loads((out / "lora_r4" / "prompts.json").read_text())["hex nut"] == [
        "a photograph of a hex nut"
    ]
    with open(out / "synthetic_r4" / "manifest.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert {row["prompt"] for row in rows} == {
        TEMPLATE.replace("{class}", name) for name in CLASSES
    }
    assert {row["plane"] for row in rows} == {*CLASSES} and len(rows) == 2 * 3 * 2
    with open(out / "synthetic_styles" / "manifest.csv", encoding="utf-8") as file:
        assert all(", " in row["prompt"] for row in csv.DictReader(file))
    with open(
        out / "rows" / "HB+DA" / "resnet18" / "seed0" / "predictions.csv", encoding="utf-8"
    ) as file:
        rows = list(csv.DictReader(file))
    assert (
        [*rows[0]][-3:] == [*CLASSES]
        and {row["target"] for row in rows} == {"bolt", "hex nut"}
        and len(rows) == 6
    )
    metrics = json.loads(
        (out / "rows" / "HB+DA" / "resnet18" / "seed0" / "metrics.json").read_text()
    )
    # balanced by the rarest
    assert metrics["training"]["planes"]["source"] == dict.fromkeys(CLASSES, 3)
    assert np.array(metrics["confusion"]).shape == (3, 3)


def test_a_site_is_folders_of_classes_or_a_table(sites, tmp_path):
    shop, _ = sites
    records = read_site(shop, "source", train=True)
    assert classes_of(records) == CLASSES and len(records) == 15
    assert len({record.patient for record in records}) == 15 and all(
        record.train for record in records
    )
    assert {record.center for record in records} == {"workshop"}

    lines = ["image;class;patient;split"]
    for n, record in enumerate(records):
        name, split = record.path.relative_to(shop).as_posix(), "test" if n % 5 else "train"
        lines.append(f"{name};{record.plane};p{n // 2};{split}")
    table = write_site(tmp_path / "site", dict(zip(CLASSES, (3, 4, 8))), 99, seed=3) / "images.csv"
    table.write_text("\n".join(lines) + "\n")
    read = read_site(table.parent, "source", train=False)
    assert len(read) == 15 and len({record.patient for record in read}) == 8
    assert sum(record.train for record in read) == 3 and read[3].patient == "source/p1"
    table.write_text(
        "image,class\n"
        + "".join(f"{line.split(';')[0]},{line.split(';')[1]}\n" for line in lines[1:])
    )
    assert all(record.train for record in read_site(table.parent, "target", train=True))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("image,class\na/0.png,a\n", "has images of a alone; a classifier tells two apart"),
        ("image,class\na/0.png,a\nb/0.png,\n", "line 3: image or class is empty"),
        (
            "image,class\na/0.png,a\nb/0.png,A\n",
            "line 3: the classes a and A differ by capitals alone",
        ),
        ("image,class\na/0.png,a\na/0.png,b\n", r"a/0\.png is listed twice"),
        ("image,class\na/0.png,x/y\nb/0.png,b\n", "line 2: 'x/y' is no name for a class"),
        ("image,class\na/0.png,prediction\nb/0.png,b\n", "'prediction' is no name for a class"),
        (
            "image,class\n../a/0.png,a\nb/0.png,b\n",
            r"line 2: \.\./a/0\.png: give the image's path below",
        ),
        (
            "image,class,split\na/0.png,a,maybe\nb/0.png,b,test\n",
            "line 2: split is 'maybe', neither train nor test",
        ),
        ("image,label\na/0.png,a\n", "needs the columns image, class, but has image, label"),
    ],
)
def test_a_table_that_means_nothing_is_one_line(tmp_path, text, words):
    (tmp_path / "images.csv").write_text(text)
    with pytest.raises(DatasetError, match=words) as error:
        read_site(tmp_path, "source", train=True)
    assert "\n" not in str(error.value)


def test_folders_that_are_no_site_are_one_line(tmp_path):
    with pytest.raises(DatasetError, match="no such folder"):
        read_site(tmp_path / "none", "source", train=True)
    with pytest.raises(DatasetError, match=r"neither images\.csv nor folders of images"):
        read_site(tmp_path, "source", train=True)
    write_site(tmp_path, {"bolt": 1}, 200, seed=0)
    with pytest.raises(DatasetError, match="has images of bolt alone"):
        read_site(tmp_path, "source", train=True)
    (tmp_path / "nut").mkdir()
    with pytest.raises(DatasetError, match="nut: no images in it"):
        read_site(tmp_path, "source", train=True)
    Image.new("L", (8, 8)).save(tmp_path / "stray.png")
    with pytest.raises(DatasetError, match=r"stray\.png: lies beside the folders of the classes"):
        read_site(tmp_path, "source", train=True)


def test_captions_are_made_of_class_names_and_found_again_beside_the_lora(sites, tmp_path):
    shop, _ = sites
    images, held_out = training_images(None, None, None, 2, 0, 3, source=shop, template=TEMPLATE)
    assert sorted({image.caption for image in images}) == [
        "a photograph of a " + name for name in CLASSES
    ]
    assert (
        len(images) == 6
        and len(held_out) == 3
        and not {i.path for i in images} & {i.path for i in held_out}
    )
    prompts = prompts_of(CLASSES, TEMPLATE)
    (tmp_path / "prompts.json").write_text(
        json.dumps({name: [prompt] for name, prompt in prompts.items()})
    )
    assert prompts_beside([tmp_path / "lora.safetensors"]) == prompts
    assert read_prompts("paper", prompts)["bolt"] == ("a photograph of a bolt",)
    assert all(
        text.startswith("a photograph of a bolt, ")
        for text in read_prompts("styles", prompts)["bolt"]
    )
    assert read_prompts(str(tmp_path / "prompts.json")) == read_prompts("paper", prompts)
    with pytest.raises(DatasetError, match="of the paper's planes, not of bolt, hex nut, washer"):
        read_prompts("detailed", prompts)
    assert set(prompts_beside([tmp_path / "elsewhere" / "lora.safetensors"])) == {*PLANES}
    for template in ("no place", "{class} {class}"):
        with pytest.raises(DatasetError, match="says once where the class goes"):
            prompts_of(CLASSES, template)


def test_a_class_that_nobody_can_learn_is_told(sites, tmp_path):
    shop, _ = sites
    other = write_site(tmp_path / "other", {"bolt": 1, "rivet": 1}, 200, seed=4)
    nothing = dict.fromkeys(
        ("spanish", "african", "manifest", "per_plane", "validation", "african_train")
    )
    args = type("Args", (), nothing | {"source": shop, "target": other, "synthetic": [], "seed": 0})
    with pytest.raises(
        ValueError, match=r"nobody can learn rivet, as .* has images of bolt, hex nut, washer alone"
    ):
        choose_records(args, lambda text: None)
