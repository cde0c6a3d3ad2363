"""The dataset readers on small files with every oddity of the real ones, and on the real ones;
selections; leaks."""

import csv
import random
from collections import Counter
from pathlib import Path

import pytest

from planes import PAPER_COUNTS, PLANES, Plane
from planes.datasets import (
    DatasetError,
    Record,
    balanced,
    read_african,
    read_manifest,
    read_spanish,
    read_synthetic,
    require_images,
    validation_split,
)
from planes.leaks import describe_leaks, leaks
from planes.phantoms.phantom import write_african_layout, write_spanish_layout

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
real_data = pytest.mark.skipif(
    not DATA.is_dir(), reason="the real datasets are not in ../shared/data"
)

SPANISH = """Image_name;Patient_num;Plane;Brain_plane;Operator;US_Machine;Train
a_1;305;Fetal abdomen;Not A Brain;Op. 1;Aloka;1
a_2;305;Fetal brain;Other;Other;Other;1
a_3;7;Maternal cervix;Not A Brain;Op. 1;Aloka;1
a_4;8;Other;Not A Brain;Op. 2;Voluson E6;0
"""
AFRICAN = """Patient_num,Plane,Train,Center,Filename
1,Fetal femur,0,Malawi,patient001_MWI_plane2
1,Fetal thorax,1,Egypt,patient001_EGY_plane3
2,Other,1,Egypt,patient002_EGY_plane4
"""


def spanish(root: Path, text: str = SPANISH) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    (root / "FETAL_PLANES_DB_data.csv").write_bytes(text.encode("utf-8"))
    return root


def african(root: Path, text: str = AFRICAN) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    (root / "African_planes_database.csv").write_bytes(text.encode("utf-8"))
    return root


def records_of(counts: dict[str, int], source: str = "spain") -> list[Record]:
    """patient -> number of images, their planes in turn."""
    names = [(patient, n) for patient, count in counts.items() for n in range(count)]
    return [
        Record(
            Path(f"{patient}_{n}.png"), PLANES[i % 5], f"{source}/{patient}", True, source, "Spain"
        )
        for i, (patient, n) in enumerate(names)
    ]


# --- small files ---


def test_a_spanish_row_becomes_a_record_and_the_cervix_is_left_out(tmp_path):
    records = read_spanish(spanish(tmp_path))
    assert [(r.name, r.plane, r.patient, r.train) for r in records] == [
        ("a_1", Plane.ABDOMEN, "spain/305", True),
        ("a_2", Plane.BRAIN, "spain/305", True),
        ("a_4", Plane.OTHER, "spain/8", False),
    ]
    assert records[0].path == tmp_path / "Images" / "a_1.png"
    assert {(r.source, r.center) for r in records} == {("spain", "Spain")}


def test_an_african_patient_is_a_number_within_a_country(tmp_path):
    records = read_african(african(tmp_path))
    assert [(r.plane, r.patient, r.train, r.center) for r in records] == [
        (Plane.FEMUR, "africa/Malawi/1", False, "Malawi"),
        (Plane.THORAX, "africa/Egypt/1", True, "Egypt"),
        (Plane.OTHER, "africa/Egypt/2", True, "Egypt"),
    ]
    assert records[1].path == tmp_path / "Egypt" / "patient001_EGY_plane3.png"
    assert {r.source for r in records} == {"africa"}


@pytest.mark.parametrize(
    "oddity",
    [
        lambda text: "\ufeff" + text,
        lambda text: text.replace("\n", "\r\n"),
        lambda text: text.replace(";", ","),
        lambda text: text.replace("\n", " \n"),
        lambda text: text.replace(";", " ; "),
        lambda text: text.removesuffix("\n"),
        lambda text: text + "\n;;;;;;\n\n",
        lambda text: text.replace("Fetal abdomen", '"Fetal abdomen"'),
        lambda text: text.replace("Fetal abdomen", "fetal Abdomen"),
    ],
    ids=[
        "BOM",
        "CRLF",
        "comma",
        "trailing space",
        "padded",
        "no last newline",
        "empty lines",
        "quotes",
        "case",
    ],
)
def test_how_a_table_is_written_makes_no_difference(tmp_path, oddity):
    assert read_spanish(spanish(tmp_path, oddity(SPANISH))) == read_spanish(
        spanish(tmp_path, SPANISH)
    )
    assert len(read_spanish(spanish(tmp_path, oddity(SPANISH)))) == 3


def test_the_top_folder_of_an_archive_is_found(tmp_path):
    spanish(tmp_path / "FETAL_PLANES_ZENODO")
    african(tmp_path / "Zenodo_dataset")
    assert read_spanish(tmp_path) == read_spanish(tmp_path / "FETAL_PLANES_ZENODO")
    assert read_african(str(tmp_path)) == read_african(tmp_path / "Zenodo_dataset")


def test_another_table_beside_the_images_can_be_named(tmp_path):
    spanish(tmp_path / "FETAL_PLANES_ZENODO")
    short = "".join(SPANISH.splitlines(keepends=True)[:2])
    (tmp_path / "FETAL_PLANES_ZENODO" / "short.csv").write_text(short)
    assert [r.name for r in read_spanish(tmp_path, table="short.csv")] == ["a_1"]


@pytest.mark.parametrize(
    ("broken", "complaint"),
    [
        ("", "needs the columns Plane, Image_name"),
        (SPANISH.splitlines()[0], "no images listed"),
        (SPANISH.replace(";", "\t"), "separate columns by ; or ,"),
        (
            SPANISH.replace("Patient_num", "Patient"),
            "needs the columns .*Patient_num.* has .*Patient, Plane",
        ),
        (
            SPANISH.replace("Fetal brain", "Fetal brian"),
            r"line 3, Plane: 'fetal brian' is none of abdomen, brain",
        ),
        (SPANISH.replace("Fetal brain", "2"), r"line 3, Plane: '2' is none of"),
        (SPANISH.replace("Aloka;1", "Aloka;yes"), r"line 2, Train: 'yes' is none of 1, 0"),
        (SPANISH.replace("a_2;305", "a_2;"), "line 3: Patient_num is empty"),
        (SPANISH.replace("Op. 2;", ""), "line 5: 6 cells under 7 headers"),
        (SPANISH + "x" * 200_000, "field larger than"),
    ],
)
def test_a_broken_table_is_told_in_one_line_with_its_place(tmp_path, broken, complaint):
    with pytest.raises(DatasetError, match=complaint) as error:
        read_spanish(spanish(tmp_path, broken))
    assert "\n" not in str(error.value) and "FETAL_PLANES_DB_data.csv" in str(error.value)


def test_a_missing_table_is_named_with_where_it_was_looked_for_and_where_to_get_it(tmp_path):
    with pytest.raises(
        DatasetError, match=r"FETAL_PLANES_ZENODO/FETAL_PLANES_DB_data\.csv .*3904280"
    ):
        read_spanish(tmp_path)
    with pytest.raises(
        DatasetError, match=r"Zenodo_dataset/African_planes_database\.csv .*7540448"
    ):
        read_african(tmp_path)
    with pytest.raises(DatasetError, match="no such file"):
        read_manifest(tmp_path / "list.csv", [])


def test_a_spreadsheet_under_the_name_of_a_table_is_refused(tmp_path):
    (tmp_path / "FETAL_PLANES_DB_data.csv").write_bytes(b"PK\x03\x04\xff\xfe")
    with pytest.raises(DatasetError, match="CSV in UTF-8"):
        read_spanish(tmp_path)


@pytest.mark.parametrize(
    "text",
    [
        "Image_name,Plane\na_4,Other\na_1,Fetal abdomen\n",
        "\ufeffImage_name,Plane,Train \r\na_4,Other,1\r\na_1,Fetal abdomen,1\r\n",
        ",Unnamed: 0,Image_name,Plane,Train \n7,8,a_4,0,1\n9,9,a_1,1,1",
        "Image_name,category,Train\r\na_4,other,1\r\na_3,cervix,1\r\na_1,abdomen,1",
        "Filename,Plane\na_4,0\na_3,3\na_1,1\n",
    ],
    ids=["text", "BOM and CRLF", "numbers", "category with cervix", "Filename"],
)
def test_a_list_selects_records_in_its_own_order(tmp_path, text):
    (tmp_path / "list.csv").write_bytes(text.encode())
    records = read_spanish(spanish(tmp_path))
    assert read_manifest(tmp_path / "list.csv", records) == [records[2], records[0]]


def test_the_authors_numbers_are_other_abdomen_brain_cervix_femur_thorax(tmp_path):
    labels = [
        "Other",
        "Fetal abdomen",
        "Fetal brain",
        "Maternal cervix",
        "Fetal femur",
        "Fetal thorax",
    ]
    table = "Image_name,Patient_num,Plane,Train\n" + "".join(
        f"a_{n},1,{label},1\n" for n, label in enumerate(labels)
    )
    (tmp_path / "list.csv").write_text(
        "Image_name,Plane\n" + "".join(f"a_{n},{n}\n" for n in range(6))
    )
    chosen = read_manifest(tmp_path / "list.csv", read_spanish(spanish(tmp_path, table)))
    assert [r.name for r in chosen] == ["a_0", "a_1", "a_2", "a_4", "a_5"]


@pytest.mark.parametrize(
    ("rows", "complaint"),
    [
        ("a_9,Other", "line 2: a_9 is not in the dataset"),
        ("a_1,Fetal brain", "line 2: a_1 is listed as brain, but the dataset says abdomen"),
        ("a_4,Other\na_4,Other", "line 3: a_4 is listed twice"),
        ("a_1,6", "line 2, Plane: '6' is none of"),
    ],
)
def test_a_list_that_does_not_fit_the_dataset_is_refused(tmp_path, rows, complaint):
    (tmp_path / "list.csv").write_text(f"Image_name,Plane\n{rows}\n")
    with pytest.raises(DatasetError, match=complaint):
        read_manifest(tmp_path / "list.csv", read_spanish(spanish(tmp_path)))


def test_the_authors_published_synthetic_images_are_found_at_any_depth(tmp_path):
    (tmp_path / "femur" / "unipc").mkdir(parents=True)
    there = tmp_path / "femur" / "unipc" / "00001-2671683619.png"
    there.touch()
    lines = ["Image_name,Plane,Train", "00001-2671683619,Fetal femur,1", "00002-77,Other,1"]
    (tmp_path / "list.csv").write_text("\ufeff" + "\r\n".join(lines), encoding="utf-8")
    found, lost = read_synthetic(tmp_path / "list.csv")
    assert found == Record(
        there,
        Plane.FEMUR,
        f"synthetic/femur/published/{there.stem}",
        True,
        "synthetic",
        "published",
    )
    assert lost.plane is Plane.OTHER
    with pytest.raises(DatasetError, match=r"1 of 2 images are missing \(00002-77.*13228158"):
        require_images([found, lost])


def test_synthetic_images_train_and_each_is_its_own_patient(tmp_path):
    header = "image,plane,prompt,sampler,steps,guidance,seed,lora,model"
    row = 'femur/unipc_12.png,femur,"a photo, of fetal femur",unipc,20,7.0,12,,sd'
    (tmp_path / "manifest.csv").write_text(f"{header}\n{row}\n")
    (record,) = read_synthetic(tmp_path / "manifest.csv")
    path = tmp_path / "femur" / "unipc_12.png"
    assert record == Record(
        path, Plane.FEMUR, "synthetic/femur/unipc/unipc_12", True, "synthetic", "unipc"
    )
    with pytest.raises(
        DatasetError, match=r"1 of 1 images are missing \(unipc_12\); make them with sample\.py"
    ):
        require_images([record])


def test_missing_images_are_counted_and_the_first_five_named(tmp_path):
    records = records_of({f"p{n}": 1 for n in range(9)})
    records = [
        Record(tmp_path / r.path, r.plane, r.patient, r.train, r.source, r.center) for r in records
    ]
    records[2].path.touch()
    with pytest.raises(DatasetError) as error:
        require_images(records)
    assert "8 of 9 images are missing (p0_0, p1_0, p3_0, p4_0, p5_0, ...);" in str(error.value)
    assert "zenodo.org/records/3904280" in str(error.value)
    for record in records:
        record.path.touch()
    require_images(records)


def test_the_phantoms_are_read_like_the_real_datasets(tmp_path, monkeypatch):
    # the layout is the point here, the picture takes its time
    def four_pixels(plane, site, patient, image):
        return image.integers(0, 255, (2, 2), dtype="uint8")

    monkeypatch.setattr("planes.phantoms.phantom.phantom", four_pixels)
    write_spanish_layout(tmp_path / "a", train=2, test=1, seed=0)
    write_african_layout(tmp_path / "b", patients=2, seed=0)
    a, b = read_spanish(tmp_path / "a"), read_african(tmp_path / "b")
    require_images(a + b)
    assert Counter(r.plane for r in a if r.train) == {plane: 2 for plane in PLANES}
    assert len({r.patient for r in b}) == 10
    assert not {r.patient for r in a if r.train} & {r.patient for r in a if not r.train}


# --- selections ---


def test_a_balanced_selection_takes_as_many_of_each_plane_and_depends_on_the_seed_alone():
    records = records_of({f"p{n}": 3 for n in range(40)})
    chosen = balanced(records, 6, seed=1)
    assert Counter(r.plane for r in chosen) == {plane: 6 for plane in PLANES}
    assert len(set(chosen)) == 30
    shuffled = random.Random(0).sample(records, len(records))
    assert balanced(iter(shuffled), 6, seed=1) == chosen
    assert set(balanced(records, 6, seed=2)) != set(chosen)
    assert set(balanced(records, 4, seed=1)) < set(chosen)


def test_a_balanced_selection_of_more_than_there_is_says_how_many_there_are():
    femurless = [r for r in records_of({"p": 25}) if r.plane is not Plane.FEMUR]
    with pytest.raises(DatasetError, match="only 0 images of femur, but 5 of each"):
        balanced(femurless, 5, seed=0)
    assert len(balanced(records_of({"p": 25}), 5, seed=0)) == 25


def test_a_validation_split_has_exactly_the_asked_images_and_no_patient_of_training():
    records = records_of({f"p{n}": 1 + n % 7 for n in range(200)})
    train, validation = validation_split(records, 200, seed=3)
    assert len(validation) == 200
    assert len(train) + len(validation) == len(records) == len({*train, *validation})
    assert not {r.patient for r in train} & {r.patient for r in validation}
    shuffled = random.Random(0).sample(records, len(records))
    assert validation_split(shuffled, 200, seed=3) == (train, validation)
    assert validation_split(records, 200, seed=4)[1] != validation


def test_a_validation_split_that_whole_patients_cannot_make_is_refused():
    records = records_of({f"p{n}": 3 for n in range(10)})
    with pytest.raises(DatasetError, match="whole patients add up to 6 validation images, not 7"):
        validation_split(records, 7, seed=0)
    for count in (0, 30, 31):
        with pytest.raises(DatasetError, match=f"cannot set {count} of 30 images aside"):
            validation_split(records, count, seed=0)


# --- leaks ---


def test_a_shared_patient_and_a_copied_file_are_both_found(tmp_path):
    def record(name, patient, train, content):
        (tmp_path / f"{name}.png").write_bytes(content)
        return Record(
            tmp_path / f"{name}.png", Plane.BRAIN, f"spain/{patient}", train, "spain", "Spain"
        )

    train = [
        record("a", 1, True, b"aaaa"),
        record("b", 1, True, b"bbbb"),
        record("c", 2, True, b"aaaa"),
    ]
    # d and e: a patient of training; f: copied twice; g: of equal length only; h: nothing shared
    test = [
        record("d", 1, False, b"dd"),
        record("e", 1, False, b"ee"),
        record("f", 5, False, b"aaaa"),
    ]
    test += [record("g", 6, False, b"gggg"), record("h", 7, False, b"hhhhhh")]
    found = leaks(iter(train), iter(test))
    assert {(leak.kind, leak.train.name, leak.test.name) for leak in found} == {
        ("patient", "a", "d"),
        ("patient", "a", "e"),
        ("file", "a", "f"),
        ("file", "c", "f"),
    }
    assert describe_leaks(found).splitlines() == [
        "2 test images share a patient with training:",
        "  d (spain/1) with a (spain/1)",
        "  e (spain/1) with a (spain/1)",
        "1 test images share a file with training:",
        "  f (spain/5) with a (spain/1)",
        "  f (spain/5) with c (spain/2)",
    ]


def test_files_that_are_not_there_cannot_be_checked_for_leaks(tmp_path):
    with pytest.raises(DatasetError, match="3 of 3 images are missing"):
        leaks(records_of({"p": 1}), records_of({"q": 2}))


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
def test_the_papers_counts_are_those_of_the_authors_list():
    listed = read_manifest(
        DATA / "manifests" / "all_train_no_cer.csv", read_spanish(DATA / "FETAL_PLANES_ZENODO")
    )
    assert (
        Counter(record.plane for record in listed) == PAPER_COUNTS
        and sum(PAPER_COUNTS.values()) == 6148
    )


@real_data
def test_the_spanish_counts_are_the_papers(spain):
    train, test = [r for r in spain if r.train], [r for r in spain if not r.train]
    assert size(train) == (6148, 612) and size(test) == (4626, 591)
    assert [Counter(r.plane for r in train)[plane] for plane in PLANES] == [
        353,
        1620,
        516,
        1058,
        2601,
    ]
    assert [Counter(r.plane for r in test)[plane] for plane in PLANES] == [
        358,
        1472,
        524,
        660,
        1612,
    ]
    assert not {r.patient for r in train} & {r.patient for r in test}


@real_data
def test_the_african_counts_are_the_papers(africa):
    train, test = [r for r in africa if r.train], [r for r in africa if not r.train]
    assert size(train) == (217, 61) and size(test) == (233, 66)
    assert [Counter(r.plane for r in test)[plane] for plane in PLANES] == [65, 65, 64, 39, 0]
    assert not {r.patient for r in train} & {r.patient for r in test}
    require_images(africa)


@real_data
@pytest.mark.parametrize(
    ("name", "counts"),
    [
        ("all_train_no_cer", (6148, 612)),
        ("spain_train_1150_balanced", (1150, 486)),
        ("lora_train_data", (100, 85)),
        ("spain_other_train", (230, 105)),
    ],
)
def test_the_authors_lists_hold_the_papers_images_and_patients(spain, name, counts):
    chosen = read_manifest(DATA / "manifests" / f"{name}.csv", spain)
    assert size(chosen) == counts and all(r.train for r in chosen)
    if name != "lora_train_data":  # that one also lists the cervix
        with open(DATA / "manifests" / f"{name}.csv", encoding="utf-8-sig") as file:
            assert [r.name for r in chosen] == [row["Image_name"] for row in csv.DictReader(file)]


@real_data
def test_the_lora_images_overlap_with_the_balanced_ones(spain):
    lora, classifier = (
        read_manifest(DATA / "manifests" / f"{name}.csv", spain)
        for name in ("lora_train_data", "spain_train_1150_balanced")
    )
    assert len({*lora} & {*classifier}) == 32
    assert size(list({*lora, *classifier})) == (1218, 498)
    require_images(lora)


@real_data
def test_the_spanish_images_that_are_not_there_are_missed_before_any_work(spain):
    # of the 120 files, 20 show the cervix
    with pytest.raises(
        DatasetError,
        match=r"^6048 of 6148 images are missing \(Patient00001_Plane1_1_of_15, .*3904280",
    ):
        require_images([r for r in spain if r.train])


@real_data
def test_22_african_test_images_have_a_copy_in_african_training(africa):
    found = leaks([r for r in africa if r.train], [r for r in africa if not r.train])
    assert {leak.kind for leak in found} == {"file"}
    assert len(found) == len({leak.test for leak in found}) == 22
    assert all(leak.train.plane is leak.test.plane for leak in found)
    planes = {}
    for leak in found:
        pair = frozenset((leak.train.patient, leak.test.patient))
        planes.setdefault(pair, set()).add(leak.test.plane)
    all_four, a, b, f, t = {*PLANES[:4]}, *PLANES[:4]
    expected = {
        ("Algeria", 4, 31): all_four,
        ("Algeria", 14, 41): all_four,
        ("Algeria", 24, 52): all_four,
        ("Algeria", 27, 53): all_four,
        ("Malawi", 9, 30): {f},
        ("Malawi", 11, 22): {b, f, t},
        ("Egypt", 5, 8): {a, t},
    }
    assert planes == {
        frozenset((f"africa/{c}/{m}", f"africa/{c}/{n}")): p for (c, m, n), p in expected.items()
    }
    text = describe_leaks(found)
    assert text.startswith("22 test images share a file") and all(
        leak.test.name in text for leak in found
    )


@real_data
def test_nothing_is_shared_between_the_spanish_lora_images_and_the_african_set(spain, africa):
    found = leaks(read_manifest(DATA / "manifests" / "lora_train_data.csv", spain), africa)
    assert describe_leaks(found) == "training and test share no patient and no file"


@real_data
def test_the_papers_validation_set_can_be_cut_from_both_training_sets(spain):
    balanced_list = read_manifest(DATA / "manifests" / "spain_train_1150_balanced.csv", spain)
    for records in (balanced_list, [r for r in spain if r.train]):
        for seed in range(5):
            train, validation = validation_split(records, seed=seed)
            assert len(validation) == 200 and len(train) == len(records) - 200


@real_data
def test_the_papers_balanced_selections_can_be_drawn(spain):
    train = [r for r in spain if r.train]
    lora, classifier = balanced(train, 20, seed=0), balanced(train, 230, seed=0)
    assert len(lora) == 100 and len(classifier) == 1150 and {*lora} < {*classifier}
