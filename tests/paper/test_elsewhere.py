"""Finished rows, tested at another site: equal images give what the row itself said, others a
report of their own."""

import csv
import runpy
from pathlib import Path

import pytest

from classify import ClassifyError
from paper.elsewhere import main, parse_args
from paper.results import ResultError
from planes.phantoms.phantom import write_african_layout, write_spanish_layout
from planes.phantoms.sites import SITE_C


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of one row of ResNet18, a few steps long, and the datasets it was made of."""
    root = tmp_path_factory.mktemp("elsewhere")
    write_spanish_layout(root / "spanish", train=2, test=0, seed=0)
    write_african_layout(root / "b", patients=2, seed=0)
    write_african_layout(root / "c", patients=4, seed=1, site=SITE_C)
    script = Path(__file__).resolve().parents[2] / "classify.py"
    classify = runpy.run_path(str(script), run_name="classify_script")
    flags = [
        "--spanish",
        str(root / "spanish"),
        "--african",
        str(root / "b"),
        "--weights",
        "none",
        "--size",
        "64",
    ]
    out = root / "run" / "rows" / "ES" / "resnet18" / "seed3"
    flags += ["--epochs", "1", "--workers", "0", "--seed", "3", "--out", str(out)]
    classify["main"](classify["parse_args"](flags))
    return root


def rows_of(folder):
    with open(folder / "results.csv", encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_on_the_same_images_a_row_says_what_it_said(run, tmp_path):
    main(parse_args([str(run / "run"), "--african", str(run / "b"), "--out", str(tmp_path / "b")]))
    with open(
        run / "run/rows/ES/resnet18/seed3/predictions.csv", encoding="utf-8", newline=""
    ) as file:
        said = [row["prediction"] == row["target"] for row in csv.DictReader(file)]
    (row,) = {line["all_plain_accuracy"] for line in rows_of(tmp_path / "b")}
    assert float(row) == pytest.approx(sum(said) / len(said), abs=1e-6)


def test_of_another_site_the_report_is_of_its_own_test_images(run, tmp_path):
    main(parse_args([str(run / "run"), "--african", str(run / "c"), "--out", str(tmp_path / "c")]))
    text = (tmp_path / "c" / "report.md").read_text(encoding="utf-8")
    assert text.startswith("# FU-LoRA at one more site") and "Seeds: 3. Test: 36 images of" in text


def test_a_folder_without_rows_and_a_broken_classifier_are_named(run, tmp_path):
    with pytest.raises(ResultError, match="no finished row"):
        main(parse_args([str(tmp_path), "--african", str(run / "b"), "--out", str(tmp_path / "x")]))
    broken = tmp_path / "run" / "rows" / "ES" / "resnet18" / "seed3"
    broken.mkdir(parents=True)
    for file in (run / "run/rows/ES/resnet18/seed3").glob("*.*"):
        (broken / file.name).write_bytes(
            b"x" if file.suffix == ".safetensors" else file.read_bytes()
        )
    with pytest.raises(ClassifyError, match=r"model\.safetensors"):
        main(
            parse_args(
                [str(tmp_path / "run"), "--african", str(run / "b"), "--out", str(tmp_path / "x")]
            )
        )
    assert not (tmp_path / "x").exists()
