"""The dataset readers on small files with every oddity of the real ones, and on the real ones;
selections; leaks."""

import random
from collections import Counter
from pathlib import Path

import pytest
from shorthand import DATA, real_data, refused

from planes import PAPER_COUNTS, PLANES, Plane
from planes.datasets import (
    DatasetError,
    Record,
    balanced,
    count,
    read_african,
    read_manifest,
    read_spanish,
    read_synthetic,
    require_images,
    validation_split,
)
from planes.leaks import describe_leaks, leaks, repeated

LISTS = DATA / "manifests"

SPANISH = """Image_name;Patient_num;Plane;Brain_plane;Operator;US_Machine;Train
a_1;305;Fetal abdomen;Not A Brain;Op. 1;Aloka;1
a_2;305;Fetal brain;Other;Other;Other;1
a_3;7;Maternal cervix;Not A Brain;Op. 1;Aloka;1
a_4;8;Other;Not A Brain;Op. 2;Voluson E6;0
"""
AFRICAN = """Patient_num,Plane,Train,Center,Filename
1,Fetal femur,0,Malawi,a
1,Fetal thorax,1,Egypt,a
2,Other,1,Egypt,patient002_EGY_plane4
"""


def spanish(root: Path, text: str = SPANISH, name: str = "FETAL_PLANES_DB_data.csv") -> Path:
    root.mkdir(exist_ok=True)
    (root / name).write_bytes(text.encode("utf-8"))
    return root


def african(root: Path, text: str = AFRICAN) -> Path:
    return spanish(root, text, "African_planes_database.csv")


def records_of(counts: dict[str, int], folder: Path = Path()) -> list[Record]:
    """patient -> number of images, their planes in turn."""
    names = [(patient, n) for patient, count in counts.items() for n in range(count)]
    return [
        Record(folder / f"{patient}_{n}.png", PLANES[i % 5], patient, True, "spain", "Spain")
        for i, (patient, n) in enumerate(names)
    ]


# --- small files ---


def test_a_row_becomes_a_record_and_the_cervix_is_left_out(tmp_path):
    root, spain = tmp_path / "Images", ("spain", "Spain")
    assert read_spanish(spanish(tmp_path)) == [
        Record(root / "a_1.png", Plane.ABDOMEN, "spain/305", True, *spain),
        Record(root / "a_2.png", Plane.BRAIN, "spain/305", True, *spain),
        Record(root / "a_4.png", Plane.OTHER, "spain/8", False, *spain),
    ]
    malawi, egypt, other = tmp_path / "Malawi", tmp_path / "Egypt", "patient002_EGY_plane4.png"
    assert read_african(african(tmp_path)) == [
        Record(malawi / "a.png", Plane.FEMUR, "africa/Malawi/1", False, "africa", "Malawi"),
        Record(egypt / "a.png", Plane.THORAX, "africa/Egypt/1", True, "africa", "Egypt"),
        Record(egypt / other, Plane.OTHER, "africa/Egypt/2", True, "africa", "Egypt"),
    ]


def test_how_a_table_is_written_makes_no_difference(tmp_path):
    plain = read_spanish(spanish(tmp_path))
    padded = SPANISH.replace(";", " , ").replace("\n", " \r\n")
    assert read_spanish(spanish(tmp_path, f"\ufeff{padded}\r\n,,,,,,\r\n\r\n")) == plain
    quoted = SPANISH.replace("Fetal abdomen", '"fetal Abdomen"').removesuffix("\n")
    assert read_spanish(spanish(tmp_path, quoted)) == plain


def test_the_top_folder_of_an_archive_is_found_and_a_missing_table_named(tmp_path):
    with refused(DatasetError, r"ZENODO/FETAL_PLANES_DB_data\.csv .*3904280"):
        read_spanish(tmp_path)
    with refused(DatasetError, r"dataset/African_planes_database\.csv .*7540448"):
        read_african(tmp_path)
    inside = spanish(tmp_path / "FETAL_PLANES_ZENODO"), african(tmp_path / "Zenodo_dataset")
    assert read_spanish(tmp_path) == read_spanish(inside[0])
    assert read_african(str(tmp_path)) == read_african(inside[1])


@pytest.mark.parametrize(
    "broken, complaint",
    {
        "": "needs the columns Plane, Image_name",
        SPANISH.splitlines()[0]: "no images listed",
        SPANISH.replace(";", "\t"): "separate columns by ; or ,",
        SPANISH.replace("Patient_num", "Patient"): "columns .*Patient_num.* has .*Patient, Plane",
        SPANISH.replace("Fetal brain", "2"): r"line 3, Plane: '2' is none of abdomen, brain",
        SPANISH.replace("Aloka;1", "Aloka;yes"): r"line 2, Train: 'yes' is none of 1, 0",
        SPANISH.replace("a_2;305", "a_2;"): "line 3: Patient_num is empty",
        SPANISH.replace("Op. 2;", ""): "line 5: 6 cells under 7 headers",
        SPANISH.replace("a_4", "a_1"): "line 5: a_1 is listed twice, before in .*, line 2",
        "PK\x03\x04\udcff": "cannot be read as text in UTF-8",
    }.items(),
)
def test_a_broken_table_is_told_in_one_line_with_its_place(tmp_path, broken, complaint):
    path = spanish(tmp_path) / "FETAL_PLANES_DB_data.csv"
    path.write_bytes(broken.encode("utf-8", "surrogateescape"))
    with refused(DatasetError, complaint, path):
        read_spanish(tmp_path)


@pytest.mark.parametrize(
    "text",
    [
        "\ufeffImage_name,Plane,Train \r\na_4,Other,1\r\na_1,Fetal abdomen,1\r\n",
        "Image_name,category,Train\r\na_4,other,1\r\na_3,cervix,1\r\na_1,abdomen,1",
        ",Unnamed: 0,Filename,Plane\n7,8,a_4,0\n9,9,a_3,3\n1,1,a_1,1\n",
    ],
    ids=["names", "category with cervix", "numbers"],
)
def test_a_list_selects_records_in_its_own_order(tmp_path, text):
    (tmp_path / "list.csv").write_bytes(text.encode())
    records = read_spanish(spanish(tmp_path))
    assert read_manifest(tmp_path / "list.csv", records) == [records[2], records[0]]


@pytest.mark.parametrize(
    "rows, complaint",
    [
        ("a_9,Other", "a_9 is listed as other, which is not in the dataset"),
        ("a_1,2", "a_1 is listed as brain, which is not in the dataset"),
        ("a_1,6", "line 2, Plane: '6' is none of"),
    ],
)
def test_a_list_that_does_not_fit_the_dataset_is_refused(tmp_path, rows, complaint):
    (tmp_path / "list.csv").write_text(f"Image_name,Plane\n{rows}\n")
    with refused(DatasetError, complaint):
        read_manifest(tmp_path / "list.csv", read_spanish(spanish(tmp_path)))


def test_synthetic_images_train_and_each_is_its_own_patient(tmp_path):
    (tmp_path / "manifest.csv").write_text(
        'image,plane,prompt,sampler\nfemur/unipc_12.png,femur,"a photo, of fetal femur",unipc\n'
    )
    (made,) = read_synthetic(tmp_path / "manifest.csv")
    path, patient = tmp_path / "femur/unipc_12.png", "synthetic/femur/unipc/unipc_12"
    assert made == Record(path, Plane.FEMUR, patient, True, "synthetic", "unipc")
    with refused(DatasetError, r"1 of 1 .*unipc_12\.png; make them with sample\.py"):
        require_images([made])


def test_the_authors_published_synthetic_images_are_found_at_any_depth(tmp_path):
    path = tmp_path / "femur" / "unipc" / "00001-26.png"
    path.parent.mkdir(parents=True)
    path.touch()
    lines = ["\ufeffImage_name,Plane,Train", "00001-26,Fetal femur,1", "00002-77,Other,1"]
    (tmp_path / "list.csv").write_text("\r\n".join(lines), encoding="utf-8")
    found, lost = read_synthetic(tmp_path / "list.csv")
    patient = "synthetic/femur/published/00001-26"
    assert found == Record(path, Plane.FEMUR, patient, True, "synthetic", "published")
    with refused(DatasetError, r"1 of 2 images are missing.*00002-77.*13228158"):
        require_images([found, lost])
    (tmp_path / "previews").mkdir()
    (tmp_path / "previews" / path.name).touch()
    with refused(DatasetError, r"00001-26 is .*26\.png and .*26\.png: move the folder"):
        read_synthetic(tmp_path / "list.csv")


# --- selections ---


def test_a_balanced_selection_takes_as_many_of_each_plane_and_depends_on_the_seed_alone():
    records = records_of({f"p{n}": 3 for n in range(40)})
    chosen = balanced(records, 6, seed=1)
    assert Counter(r.plane for r in chosen) == dict.fromkeys(PLANES, 6) and len({*chosen}) == 30
    assert [r.path.stem for r in chosen[:3]] == ["p1_2", "p5_0", "p18_1"]
    shuffled = random.Random(0).sample(records, len(records))
    assert balanced(shuffled, 6, seed=1) == chosen
    assert set(balanced(records, 4, seed=1)) < set(chosen)
    femurless = [r for r in records if r.plane is not Plane.FEMUR]
    with refused(DatasetError, "images of femur: 0, 5 of each"):
        balanced(femurless, 5, seed=0)
    assert count(chosen) == {
        "images": 30,
        "patients": len({r.patient for r in chosen}),
        "sources": {"spain": 30},
        "planes": {"spain": dict.fromkeys(PLANES, 6)},
    }


def test_a_validation_split_has_exactly_the_asked_images_and_no_patient_of_training():
    records = records_of({f"p{n}": 1 + n % 7 for n in range(200)})
    train, validation = validation_split(records, seed=3)
    assert len(validation) == 200 and len({*train, *validation}) == len(records)
    assert not {r.patient for r in train} & {r.patient for r in validation}
    shuffled = random.Random(0).sample(records, len(records))
    assert validation_split(shuffled, 200, seed=3) == (train, validation)
    assert validation_split(records, 200, seed=4)[1] != validation


def test_a_validation_split_has_no_more_than_asked_for_and_at_least_a_patient():
    records = records_of({f"p{n}": 3 for n in range(10)})
    assert len(validation_split(records, 7, seed=0)[1]) == 6
    with refused(DatasetError, "no patient has 2 images or fewer"):
        validation_split(records, 2, seed=0)
    with refused(DatasetError, "cannot set 30 of 30 images aside"):
        validation_split(records, 30, seed=0)


# --- leaks ---


def test_a_shared_patient_and_a_copied_file_are_both_found(tmp_path):
    def record(name, patient, content):
        (tmp_path / f"{name}.png").write_bytes(content)
        return Record(tmp_path / f"{name}.png", Plane.BRAIN, patient, name < "d", "spain", "Spain")

    train = [record("a", 1, b"aaaa"), record("b", 1, b"bbbb"), record("c", 2, b"aaaa")]
    # d and e: a patient of training; f: copied twice; g: of equal length only; h: nothing shared
    test = [record("d", 1, b"dd"), record("e", 1, b"ee"), record("f", 5, b"aaaa")]
    test += [record("g", 6, b"gggg"), record("h", 7, b"hhhhhh")]
    assert describe_leaks(leaks(train, test)).splitlines() == [
        "test images are not new:",
        "  d (1) has the patient of a (1)",
        "  e (1) has the patient of a (1)",
        "  f (5) has the file of a (1)",
        "  f (5) has the file of c (2)",
    ]
    assert describe_leaks([]) == "training and test share no file, and no patient of one site"
    again = record("i", 8, b"gggg")
    assert repeated([*test, again, *train]) == {test[2], again}


# --- the real datasets ---


def size(records: list[Record]) -> tuple[int, int]:
    return len(records), len({r.patient for r in records})


@pytest.fixture(scope="module")
def spain():
    return read_spanish(DATA)


@pytest.fixture(scope="module")
def africa():
    return read_african(DATA)


@real_data
def test_the_counts_and_patients_are_the_papers(spain, africa):
    parts = [[r for r in every if r.train == flag] for every in (spain, africa) for flag in (1, 0)]
    assert [*map(size, parts)] == [(6148, 612), (4626, 591), (217, 61), (233, 66)]
    spanish, tested, _, african = [Counter(r.plane for r in part) for part in parts]
    assert spanish == PAPER_COUNTS
    assert [tested[plane] for plane in PLANES] == [358, 1472, 524, 660, 1612]
    assert [african[plane] for plane in PLANES] == [65, 65, 64, 39, 0]
    require_images(africa)
    # of the 120 files, 20 show the cervix
    missing = r"^6048 of 6148 images are missing, such as .*Patient00001_Plane1_1_of_15.*/3904280$"
    with refused(DatasetError, missing):
        require_images(parts[0])


@real_data
@pytest.mark.parametrize(
    "name, counts",
    [
        ("all_train_no_cer", (6148, 612)),
        ("spain_train_1150_balanced", (1150, 486)),
        ("lora_train_data", (100, 85)),
        ("spain_other_train", (230, 105)),
    ],
)
def test_the_authors_lists_hold_the_papers_images_and_patients(spain, name, counts):
    chosen = read_manifest(LISTS / f"{name}.csv", spain)
    assert size(chosen) == counts and all(r.train for r in chosen)


@real_data
def test_the_lora_images_overlap_with_the_balanced_ones_and_not_with_the_african_set(spain, africa):
    lora = read_manifest(LISTS / "lora_train_data.csv", spain)
    classifier = read_manifest(LISTS / "spain_train_1150_balanced.csv", spain)
    assert len({*lora} & {*classifier}) == 32
    assert size(list({*lora, *classifier})) == (1218, 498)
    assert leaks(lora, africa) == []
    assert len(validation_split(classifier, seed=0)[1]) == 200
