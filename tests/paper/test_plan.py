"""The paper's rows as data, and the preview of what a reproduction needs."""

import runpy
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest

from ldm import MINI
from paper.plan import BEYOND_ROWS, QUICK_ROWS, ROWS, choose
from paper.preview import Selections, missing_weights
from planes import PLANES

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT.parent / "shared" / "data"


def test_the_plan_is_both_tables_the_controls_and_the_style_words():
    assert Counter(row.table for row in ROWS) == {"1": 20, "2": 4, "controls": 20, "styles": 10}
    assert len({(row.data, row.classifier) for row in ROWS}) == 53  # ES with ViT is in both tables
    assert [row.name for row in ROWS if row.table == "2"] == [
        f"{data}/ViT b16" for data in ("AF", "ES", "ES+AF", "HB-all")
    ]


@pytest.mark.parametrize(
    "name, count",
    [
        ("HB+DA/ResNet18", 1),
        ("hb+da/resnet18", 1),
        ("HB+DA", 5),
        ("MobileNet v2", 10),
        ("vit_b_16", 14),
        ("table 2", 4),
        ("table beyond", 3),
        ("controls", 20),
        ("table styles", 10),
    ],
)
def test_rows_are_chosen_by_row_data_model_classifier_or_table(name, count):
    assert len(choose(ROWS + BEYOND_ROWS, [name])) == count


def test_no_name_chooses_all_and_an_unknown_one_is_an_error():
    assert choose(QUICK_ROWS, []) == QUICK_ROWS
    with pytest.raises(ValueError, match="no row is called 'ES/VGG'"):
        choose(ROWS, ["ES", "ES/VGG"])


@pytest.fixture(scope="module")
def script():
    return runpy.run_path(str(ROOT / "reproduce.py"), run_name="reproduce")


def plan(script, capsys, *flags) -> str:
    script["main"](script["parse_args"](["--plan", *map(str, flags)]))
    return capsys.readouterr().out


def test_the_embedded_default_needs_nothing_and_says_how_long_it_takes(script, capsys, tmp_path):
    text = plan(script, capsys, "--out", tmp_path / "runs")
    assert "phantoms of two sites stand in" in text and "on two CPU cores" in text
    assert text.count("(table 1)") == 20 and "as above" in text
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("only", "loras", "images"),
    [
        ("HB+DA", "rank 32", 500),
        ("HB-styles+DA", "1 of rank 32 with captions of their own", 500),
        ("resnet18", "rank 32 and 1 of rank 32 with captions of their own", 1000),
    ],
)
def test_a_plan_counts_the_loras_and_images_that_its_rows_need(
    script, capsys, tmp_path, only, loras, images
):
    text = plan(script, capsys, "--only", only, "--out", tmp_path)
    assert f"LoRAs to train: {loras}; synthetic images to make: {images:,}\n" in text


def test_a_quick_plan_counts_the_fewer_images_that_it_makes(script, capsys, tmp_path):
    text = plan(script, capsys, "--quick", "--out", tmp_path)
    cells = {
        line.split()[0]: line.split()[3:6] for line in text.splitlines() if "/ResNet18" in line
    }
    assert cells["HB-styles+DA/ResNet18"] == cells["HB+DA/ResNet18"] == ["115", "160", "0"]
    assert "synthetic images to make: 320\n" in text and "6 rows x 3 seeds" in text


def test_a_list_of_synthetic_images_stands_in_for_the_papers_kind_alone(script, capsys, tmp_path):
    (tmp_path / "manifest.csv").write_text(
        "image,plane,sampler\n0.png,brain,euler\n1.png,femur,euler\n"
    )
    text = plan(
        script,
        capsys,
        "--quick",
        "--synthetic",
        tmp_path / "manifest.csv",
        "--out",
        tmp_path / "runs",
    )
    cells = {line.split()[0]: line.split()[4] for line in text.splitlines() if "/ResNet18" in line}
    assert (cells["HB+DA/ResNet18"], cells["HB-styles+DA/ResNet18"]) == ("2", "160")
    assert "manifest.csv: 2 images are missing\n" in text
    assert (
        "LoRAs to train: 1 of rank 32 with captions of their own; synthetic images to make: 160\n"
        in text
    )


def test_the_embedded_default_has_a_tenth_of_the_papers_images_in_its_proportions(
    script, capsys, tmp_path
):
    rows = [
        line.split()
        for line in plan(script, capsys, "--out", tmp_path).splitlines()
        if "ResNet18" in line
    ]
    counts = {
        row[0]: tuple(map(int, row[3:5] if row[1].startswith("(") else row[2:4])) for row in rows
    }
    assert len(counts) == 10
    assert {name.split("/")[0]: count for name, count in counts.items()} == {
        **dict.fromkeys(("ES", "ES+DA", "ES+DA+balanced", "ES+DA+contrast"), (615, 0)),
        **dict.fromkeys(("BAL", "BAL+DA"), (115, 0)),
        **dict.fromkeys(("HB", "HB+DA", "HB-styles", "HB-styles+DA"), (115, 500)),
    }


def test_quick_runs_six_data_models_with_three_seeds_unless_told_otherwise(script):
    args = script["parse_args"](["--quick"])
    assert args.seeds == [0, 1, 2] and {row.classifier for row in args.rows} == {"resnet18"}
    assert {row.data.name for row in args.rows} == {
        "ES",
        "ES+DA",
        "HB+DA",
        "BAL+DA",
        "ES+DA+contrast",
        "HB-styles+DA",
    }
    assert script["parse_args"](["--quick", "--seeds", "4"]).seeds == [4] and script["parse_args"](
        []
    ).seeds == [0]


@pytest.mark.skipif(not DATA.exists(), reason="the real datasets are not beside the checkout")
def test_missing_images_are_counted_and_named(script, capsys, tmp_path):
    sites = ("--spanish", DATA / "FETAL_PLANES_ZENODO", "--african", DATA / "Zenodo_dataset")
    text = plan(
        script,
        capsys,
        "--model",
        "v1-5.safetensors",
        *sites,
        "--manifests",
        DATA / "manifests",
        "--out",
        tmp_path,
    )
    assert "6,048 of 6,148 are missing" in text and "African images: all 450 are there" in text
    names = (tmp_path / "missing_spanish.txt").read_text().splitlines()
    assert len(names) == 6048 and not any(Path(name).exists() for name in names)
    assert "v1-5.safetensors: missing" in text


def test_a_base_model_on_the_hub_is_cached_or_will_be_downloaded(
    script, capsys, tmp_path, monkeypatch
):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    # where nobody answers
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    flags = (
        "--model",
        "owner/name",
        "--vae",
        "owner/vae",
        "--only",
        "ES/ResNet18",
        "--out",
        tmp_path / "runs",
    )
    text = plan(script, capsys, *flags)
    assert (
        "owner/name: downloaded from the hub when needed" in text
        and "owner/vae: downloaded" in text
    )
    snapshot = tmp_path / "hub" / "models--owner--name" / "snapshots" / ("0" * 40)
    snapshot.parent.mkdir(parents=True)
    snapshot.symlink_to(MINI)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("0" * 40)
    text = plan(script, capsys, *flags)
    assert "owner/name: there" in text and "owner/vae: downloaded" in text


def test_the_base_models_flags_reach_every_stage_that_loads_it(script, tmp_path):
    base = [
        "--model",
        "a/b",
        "--tokenizer",
        "c/d",
        "--vae",
        "e/f",
        "--prediction-type",
        "v_prediction",
        "--ema",
    ]
    commands = []
    experiment = script["Experiment"](
        script["parse_args"]([*base, "--out", str(tmp_path)]),
        script["PAPER"],
        SimpleNamespace(digest=str, flags=lambda kind: ["--spanish", "s"]),
    )
    experiment.model_hashes = {"model": "1f"}  # of what a hub would have to be asked for
    experiment.stages.run = lambda name, out, *flags, **_: (
        commands.append((name, list(flags))) or out
    )
    experiment.lora_images(128)
    assert [name for name, _ in commands] == ["train_lora", "sample"]
    assert all(flags[: len(base)] == base for _, flags in commands)


def test_an_empty_machine_is_told_what_to_download_and_where_to_put_it(
    script, capsys, tmp_path, monkeypatch
):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    sites = ("--spanish", tmp_path / "spain", "--african", tmp_path / "africa")
    text = plan(
        script, capsys, "--model", tmp_path / "sd.safetensors", *sites, "--out", tmp_path / "runs"
    )
    for needed in (
        "records/3904280",
        "records/7540448",
        "planes.download --only spanish",
        "sd.safetensors: missing",
    ):
        assert needed in text
    for network in ("densenet169", "vit_b_16", "inception_v3"):
        assert f"weights of {network}: downloaded when needed, or put https://" in text
    assert str(tmp_path / "torch") in text


def test_weights_that_are_in_the_cache_are_not_missing(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    (line,) = missing_weights(["resnet18"])
    path = Path(line.rsplit(" at ", 1)[1])
    path.parent.mkdir(parents=True)
    path.touch()
    assert missing_weights(["resnet18"]) == []


@pytest.mark.skipif(not DATA.exists(), reason="the real datasets are not beside the checkout")
def test_selections_follow_the_authors_lists_or_the_same_rule():
    roots = DATA / "FETAL_PLANES_ZENODO", DATA / "Zenodo_dataset"
    lists = {"balanced": DATA / "manifests" / "spain_train_1150_balanced.csv"}
    theirs = Selections(roots, lists, {"balanced": 230}, seed=0).spanish("balanced")
    ours = Selections(roots, {}, {"balanced": 230}, seed=0).spanish("balanced")
    assert theirs != ours
    for records in (theirs, ours):
        assert set(Counter(record.plane for record in records).values()) == {230}
        assert all(record.train for record in records)


def test_a_plan_counts_phantoms_as_the_writer_makes_them(script, tmp_path, monkeypatch):
    from planes.datasets import read_african
    from planes.phantoms.phantom import write_african_layout

    monkeypatch.setattr("paper.scales.PHANTOMS", {"train": dict.fromkeys(PLANES, 2), "patients": 3})
    af = next(row.data for row in ROWS if row.data.name == "AF")
    write_african_layout(tmp_path, patients=3, seed=0)
    counted = script["EMBEDDED"].phantoms(af)
    assert counted == (0, sum(record.train for record in read_african(tmp_path)))
