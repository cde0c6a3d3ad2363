"""The paper's rows as data, the flags, what a plan counts and misses, and the stages' commands."""

import json
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
from PIL import Image
from shorthand import DATA, exits, real_data, refused

import reproduce
from harness.files import told_apart
from ldm import MINI
from paper.material import PHANTOMS, Selections, make_phantoms
from paper.plan import BEYOND_ROWS, EMBEDDED, PAPER, QUICK_ROWS, ROWS, choose
from paper.preview import missing_weights, real_counts
from paper.results import row_folder
from paper.stages import Stages, is_done
from planes import PLANES
from planes.datasets import DatasetError, read_african, read_spanish
from planes.phantoms.phantom import write_african_layout, write_spanish_layout


def test_no_two_classifiers_share_a_folder_and_no_two_sites_a_name():
    names = "probe:x/y", "probe:x_y", "probe:x y", "resnet18"
    folders = [row_folder(Path(), "ES", name, 0).parent.name for name in names]
    assert folders == ["probe_x%2Fy", "probe_x_y", "probe_x%20y", "resnet18"]
    for roots, told in {
        ("a/b/shop", "shed"): ["shop", "shed"],
        ("a/images", "b/images"): ["a/images", "b/images"],
        ("images", "b/images"): [f"{Path.cwd().name}/images", "b/images"],
        (".", "shed"): [Path.cwd().name, "shed"],
    }.items():
        assert told_apart(*map(Path, roots)) == told


def test_the_plan_is_both_tables_the_controls_and_the_style_words():
    assert Counter(row.table for row in ROWS) == {"1": 20, "2": 4, "controls": 30, "styles": 15}
    assert len({(row.data, row.classifier) for row in ROWS}) == 68  # ES with ViT is in both tables
    names = [row.name for row in ROWS if row.table == "2"]
    assert names == [f"{data}/ViT b16" for data in ("AF", "ES", "ES+AF", "HB-all")]
    quick = ["ES+DA", "HB+DA", "BAL+DA", "BAL+DA+contrast", "HB-styles+DA", "HB-styles+DA+contrast"]
    assert [row.name for row in QUICK_ROWS] == [f"{data}/ResNet18" for data in quick]


@pytest.mark.parametrize(
    "name, count",
    [
        ("hb+da/resnet18", 1),
        ("HB+DA", 5),
        ("MobileNet v2", 13),
        ("vit_b_16", 17),
        ("table 2", 4),
        ("table beyond", 3),
        ("controls", 30),
    ],
)
def test_rows_are_chosen_by_row_data_model_classifier_or_table(name, count):
    assert len(choose(ROWS + BEYOND_ROWS, [name])) == count
    assert choose(QUICK_ROWS, []) == QUICK_ROWS


@pytest.mark.parametrize(
    "flags, line",
    [
        (["--spanish", "x"], "--spanish and --african belong together"),
        (["--source", "x"], "--source and --target belong together"),
        (["--manifests", "x"], "--manifests lists real images"),
        (["--prompt-template", "a {class}"], "--prompt-template belongs to --source"),
        (["--only", "HB", "HB/ResNet50"], "no row is called 'HB/ResNet50'"),
        (["--only", "HB-token+DA"], "no row is called 'HB-token+DA'"),
    ],
)
def test_flags_that_cannot_be_are_refused_in_one_line(capsys, flags, line):
    with exits(capsys, line):
        reproduce.parse_args(flags)


def test_seeds_and_weights_follow_from_what_is_asked_for():
    asked = {"": ([0], "none"), "--quick": ([0, 1, 2], "none"), "--model x": ([0], "imagenet")}
    for flags, wanted in asked.items():
        args = reproduce.parse_args(flags.split())
        assert (args.seeds, args.weights) == wanted
    args = reproduce.parse_args(["--quick", "--beyond", "--probe", "a/b"])
    assert [row.name for row in args.rows[-3:]] == [
        f"{d}/a/b (linear probe)" for d in ("ES", "HB", "AF")
    ]
    assert [row.data.name for row in args.rows[6:7]] == ["HB-prompts+DA"] and len(args.rows) == 12


@pytest.mark.parametrize(
    "flags, cores, threads, count, line",
    [
        ("--quick", 2, None, 2, "2 processes at work, one to a core, each with 1 thread"),
        ("--quick --only BAL+DA", 8, None, 3, "3 processes at work, one to a row"),
        ("--quick", 8, 4, 2, "2 processes at work, one to a core, each with 4 threads"),
        ("--processes 3", 1, None, 3, "3 processes at work, as --processes says"),
        ("", 1, None, 1, "1 process at work, one to a core, each with 1 thread"),
        ("", 1, 1, 0, "1 process at work, one to a core, each with 1 thread"),
        ("--quick --only BAL+DA --seeds 0", 8, None, 1, "1 process at work, one to a row"),
        ("--quick --model x", 8, 8, 0, "1 process at work, as the model is large, each with 8"),
        ("--quick --model x", 16, 1, 0, "1 process at work, as the model is large, each with 1"),
    ],
)
def test_as_many_processes_as_pay_share_the_work_each_with_one_thread(
    monkeypatch, capsys, flags, cores, threads, count, line
):
    started, flags = [], ["--device", "cpu", *flags.split()]
    for name in ("OMP_NUM_THREADS", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    if threads:
        monkeypatch.setenv("OMP_NUM_THREADS", str(threads))
    monkeypatch.setattr("torch.get_num_threads", lambda: threads or 2)
    monkeypatch.setattr("paper.preview.cores", lambda: cores)
    if cores == 1:  # as on Windows
        monkeypatch.delattr("os.getloadavg", raising=False)
    monkeypatch.setattr("harness.processes.launch", lambda n, command: started.append(n))
    shared = reproduce.work_is_shared(reproduce.parse_args(flags))
    assert (started, shared) == ([count] * bool(count), bool(count))
    assert capsys.readouterr().out.startswith(line)
    with exits(capsys, "--processes 0: at least 1"):
        reproduce.parse_args(["--processes", "0"])


def test_the_quick_run_of_chosen_rows_knows_every_row_of_its_classifier():
    args = reproduce.parse_args(["--quick", "--only", "ES", "HB+DA", "HB+DA+contrast/ResNet18"])
    assert [row.name for row in args.rows] == [
        f"{data}/ResNet18" for data in ("ES", "HB+DA", "HB+DA+contrast")
    ]


def plan(capsys, *flags) -> str:
    reproduce.main(reproduce.parse_args(["--plan", *map(str, flags)]))
    return capsys.readouterr().out


def cells(text):
    return {line.split("  ")[0]: line.split()[-4:] for line in text.splitlines() if "/" in line}


def test_the_embedded_default_has_a_tenth_of_the_papers_images_in_its_proportions(capsys, tmp_path):
    text = plan(capsys, "--out", tmp_path / "runs")
    rows = {name.split("/")[0]: row for name, row in cells(text).items() if "ResNet18" in name}
    for data, row in rows.items():
        synthetic = "500" if data.startswith("HB") else "0"
        assert row == ["615" if data.startswith("ES") else "115", synthetic, "0", "1"]
    assert len(rows) == 13 and "68 rows x 1 seeds" in text and "\n- processes: " in text
    assert cells(text)["ES+AF/ViT b16"] == ["615", "0", "234", "1"]
    assert not (tmp_path / "runs").exists()


def test_phantoms_are_counted_as_they_are_written(tmp_path, monkeypatch):
    few = {"train": dict.fromkeys(PLANES, 2), "patients": 3}
    monkeypatch.setattr("paper.preview.PHANTOMS", few)
    write_african_layout(tmp_path, patients=3, seed=0)
    row = next(row for row in ROWS if row.data.name == "ES+AF")
    train = sum(record.train for record in read_african(tmp_path))
    assert (
        real_counts(row, EMBEDDED, None) == (10, train) and sum(PHANTOMS["train"].values()) == 615
    )


def test_phantoms_of_a_seed_that_were_partly_replaced_are_made_again(tmp_path, monkeypatch):
    few = {"train": dict.fromkeys(PLANES, 1), "patients": 1}
    monkeypatch.setattr("paper.material.PHANTOMS", few)
    first, _ = make_phantoms(tmp_path, seed=0)
    made = [record.path.read_bytes() for record in read_spanish(first)]
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("paper.material.write_african_layout", Mock(side_effect=KeyboardInterrupt))
        make_phantoms(tmp_path, seed=1)
    make_phantoms(tmp_path, seed=0)
    assert [record.path.read_bytes() for record in read_spanish(first)] == made


def test_an_empty_machine_is_told_what_is_missing_and_where_to_get_it(
    capsys, tmp_path, monkeypatch
):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    sites = ("--spanish", tmp_path / "spain", "--african", tmp_path / "africa")
    listed = ("--synthetic", tmp_path / "list.csv", "--out", tmp_path / "runs")
    base = ("--model", tmp_path / "sd.safetensors", "--vae", "owner/vae", "--tokenizer", MINI)
    text = plan(capsys, *base, *sites, *listed)
    for needed in (
        "records/3904280",
        "records/7540448",
        "sd.safetensors: no such file or folder",
        "owner/vae: downloaded from the hub when needed",
        f"{MINI}: there",
        "weights of densenet169: downloaded when needed, or put https://",
        f"at {tmp_path / 'torch'}",
    ):
        assert needed in text
    found = cells(text)
    assert found["HB/ResNet18"] == ["?", "given", "?", "1"]
    assert found["HB-styles/ResNet18"][1] == "5000"
    write_spanish_layout(tmp_path / "spain", train=1, test=0, seed=0)
    found = cells(plan(capsys, *base, *sites, *listed))  # where one of both is there
    assert [found[f"{data}/ViT b16"][-1] for data in ("HB", "AF")] == ["1", "1"]
    (line,) = missing_weights(["resnet18"])
    path = Path(line.rsplit(" at ", 1)[1])
    path.parent.mkdir(parents=True)
    path.touch()
    assert missing_weights(["resnet18"]) == []


def write_site(root, count):
    for n in range(2 * count):
        place = root / "ab"[n % 2] / f"{n}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (4, 4), n).save(place)
    return root


def test_a_plan_of_own_sites_refuses_what_a_stage_would(capsys, tmp_path):
    shop, shed = (write_site(tmp_path / name, 20) for name in ("shop", "shed"))
    given = "--source", shop, "--target", shed, "--only", "HB+DA", "--out", tmp_path / "runs"
    lora = tmp_path / "x.safetensors"
    lora.touch()
    words, flags = ("--prompt-template", "an x of {class}"), ("--lora", lora)
    text = plan(capsys, *given, *words)
    assert f"{shop}: 40 images" in text and "fewer than 8" not in text
    # a fifth of the patients is held out
    assert cells(text)["HB+DA/ResNet18"][:2] in ([f"{2 * n}", "200"] for n in range(12, 17))
    assert cells(plan(capsys, *given[:5], "AF"))["AF/ViT b16"][-2:] == ["left", "out"]
    assert cells(plan(capsys, *given, *words, *flags))["HB+DA/ResNet18"][1] == "200"
    (tmp_path / "prompts.json").write_text('{"a": ["an a"], "c": ["a c"]}')
    for more, line in (
        ((), "a list of prompts for each of a, b"),
        (("--prompt-template", "x"), ""),
    ):
        with refused(DatasetError, line or "--prompt-template 'x': give one that says once"):
            plan(capsys, *given, *flags, *more)
    beyond = (*flags, "--beyond", "--only", "HB-token+DA")
    for more in (beyond, (), flags):
        (tmp_path / "prompts.json").unlink(missing_ok=more != beyond)
        with refused(DatasetError, "--prompt-template '': give one that says once"):
            plan(capsys, *given, *more)
    (shop / "a/0.png").write_bytes(b"x")
    with refused(DatasetError, "not a readable image", shop / "a/0.png"):
        plan(capsys, *given, *words)


def test_a_missing_image_ends_a_run_before_its_first_stage_in_one_line(tmp_path):
    spain, africa = tmp_path / "spain", tmp_path / "africa"
    write_spanish_layout(spain, train=1, test=0, seed=0)
    write_african_layout(africa, patients=1, seed=0)
    lost = min((spain / "Images").iterdir())
    lost.unlink()
    flags = "--only", "ES/ResNet18", "--spanish", spain, "--african", africa
    selections = Selections((spain, africa), None, {"all": None}, seed=0)
    with refused(DatasetError, f"1 of 5 images are missing, such as {lost}"):
        reproduce.reproduce(reproduce.parse_args([*map(str, flags)]), EMBEDDED, selections)


@pytest.mark.slow
@real_data
def test_selections_follow_the_authors_lists_or_the_same_rule():
    roots = DATA / "FETAL_PLANES_ZENODO", DATA / "Zenodo_dataset"
    theirs = Selections(roots, DATA / "manifests", {"balanced": 230}, seed=0).images("balanced")
    ours = Selections(roots, None, {"balanced": 230}, seed=0).images("balanced")
    assert theirs != ours
    for records in (theirs, ours):
        assert set(Counter(record.plane for record in records).values()) == {230}
        assert all(record.train for record in records)


def test_every_stage_gets_the_flags_of_its_row_and_of_the_base_model(tmp_path):
    """Also those of Textual Inversion and DreamBooth, which are scripts of their own."""
    base = ["--model", "a/b", "--vae", "e/f", "--prediction-type", "v_prediction", "--ema"]
    args = reproduce.parse_args([*base, "--beyond", "--out", str(tmp_path)])
    selections = {"digest": str, "flags": lambda kind: [kind], "can_train": bool}
    selections = SimpleNamespace(**selections, roots=(None, "africa"))
    experiment, commands = reproduce.Experiment(args, PAPER, selections), {}
    experiment.model_hashes = {"model": "1f"}  # of what a hub would have to be asked for
    experiment.images_hash = str

    def run(script, out, *flags, inputs, by=None, what):
        line = " ".join(map(str, (script, *flags))).replace(f"{tmp_path}/", "")
        commands[str(out.relative_to(tmp_path))] = line, [*inputs]
        return out

    experiment.stages.run = run
    for row in args.rows:
        if row.name in ("HB-token+DA/ResNet18", "HB-dreambooth+DA/ResNet18", "ES+AF/ViT b16"):
            experiment.classify(row, seed=3)
    model = " ".join(base)
    tail, drawn = f"--rank 128 {model} lora --seed 0", f"{model} --count"
    same = "--weights imagenet --recipe paper --seed 3 --resume"
    assert commands.pop("rows/HB-token+DA/resnet18/seed3")
    assert commands == {
        "rows/ES+AF/vit_b_16/seed3": (
            f"classify --african africa --model vit_b_16 {same} all --validation 200"
            " --african-train",
            ["african", "spanish"],
        ),
        "inversion": (f"beyond inversion --token <fetal-us> {tail}", ["images", "model"]),
        "lora_r128": (
            f"train_lora --repeats 100 {tail.replace('128', '128 --resume')}",
            ["images", "model"],
        ),
        "synthetic_token": (
            "sample --embedding inversion/embedding.safetensors --lora lora_r128/lora.safetensors"
            f" {drawn} 500 --seed 0",
            ["model", "embedding", "lora"],
        ),
        "synthetic_without_lora": (f"sample {drawn} 10 --seed 0", ["model"]),
        "dreambooth": (
            f"beyond dreambooth --prior synthetic_without_lora/manifest.csv --token sks {tail}",
            ["prior", "images", "model"],
        ),
        "synthetic_dreambooth": (
            f"sample --rare-token sks --lora dreambooth/lora.safetensors {drawn} 500 --seed 0",
            ["model", "lora"],
        ),
        "rows/HB-dreambooth+DA/resnet18/seed3": (
            f"classify --african africa --model resnet18 {same} balanced --validation 200"
            " --synthetic synthetic_dreambooth/manifest.csv --augment",
            ["african", "spanish", "synthetic"],
        ),
    }


def test_the_minutes_that_are_left_are_those_of_stages_of_the_same_kind():
    stages = Stages(print, ahead={"a LoRA": 5, "images": 1})
    assert stages._progress("a LoRA") == "stage 1 of 6 (a LoRA), 0 min so far\n"
    stages.minutes["a LoRA", 2] = [3.0, 5.0]  # by two processes at once
    line = "stage 2 of 6 (a LoRA), 0 min so far, at least 8 min left\n"
    assert stages._progress("a LoRA") == line
    stages.minutes["images", 1] = [1.0]
    line = "stage 3 of 6 (images), 0 min so far, about 9 min left\n"
    assert stages._progress("images") == line


def test_a_stage_is_done_until_its_arguments_or_what_it_reads_change(tmp_path):
    asked = {"images": "1f", "arguments": {"steps": 3}}
    assert not is_done(tmp_path, asked)
    (tmp_path / "inputs.json").write_text(json.dumps(asked))
    record = tmp_path / "args.json"
    record.write_text(json.dumps({"arguments": {"steps": 3, "out": str(tmp_path)}}))
    assert is_done(tmp_path, asked)
    for other in ({"images": "2f"}, {"model": "1f"}, {"arguments": {"steps": 4}}):
        assert not is_done(tmp_path, asked | other)
    record.write_text(json.dumps({"arguments": {"steps": 4}}))  # of a run by hand
    assert not is_done(tmp_path, asked)


def test_a_checkpoint_of_other_settings_or_images_is_no_checkpoint_of_this_stage(tmp_path):
    said, out = [], tmp_path / "a b"
    stages, flags = Stages(said.append), ["--images", tmp_path / "none", "--model", "none"]

    def goes_on(*more, **inputs):
        (out / "checkpoint.pt").touch()
        with pytest.raises(DatasetError):
            stages.run("train_lora", out, *flags, *more, "--device", "cpu", inputs=inputs)
        stages.seen.clear()
        return (out / "checkpoint.pt").exists()

    out.mkdir()
    changes = [((), {"i": "1"}), ((), {"i": "2"}), (["--rank", 3], {"i": "2"})]
    assert [[goes_on(*more, **inputs) for _ in "12"] for more, inputs in changes] == [
        [False, True]
    ] * 3
    assert f"--out '{out}'" in said[0]
