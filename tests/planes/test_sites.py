"""Sites of anybody's, of any classes: folders or a table, and what is none."""

import pytest
from shorthand import refused

from planes.datasets import DatasetError
from planes.sites import classes_of, has_patients, prompts_of, read_site


def test_a_site_is_folders_of_classes_or_a_table(tmp_path):
    root = tmp_path / "shed"
    for name in ("bolt/b.png", "bolt/a.JPG", "hex nut/0.png", ".hidden/x.png"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    records = read_site(root, "source", train=True)
    assert [(r.path, r.plane, r.patient, r.train, r.source, r.center) for r in records] == [
        (root / image, image.split("/")[0], f"source/{image}", True, "source", "shed")
        for image in ("bolt/a.JPG", "bolt/b.png", "hex nut/0.png")
    ]
    assert classes_of(records) == ("bolt", "hex nut") and not has_patients(records)

    rows = ["image;class;patient;split", "x/0.png;nut;p1;Train", "x/1.png;bolt;p1;test"]
    (root / "images.csv").write_text("\n".join([*rows, "x/2.png;bolt;;"]))
    records = read_site(root, "target", train=True)
    assert [(r.plane, r.patient, r.train) for r in records] == [
        ("nut", "target/p1", True),
        ("bolt", "target/p1", False),
        ("bolt", "target/x/2.png", True),
    ]
    assert has_patients(records)


def test_names_are_told_alike_whoever_wrote_them_and_subfolders_are_patients(tmp_path):
    def read(root):
        return [
            (r.path.relative_to(root).as_posix(), r.plane, r.patient, r.train)
            for r in read_site(root, "source", train=True)
        ]

    names = "fe\u0301mur/a.png", "fémur /p1/x/b.png", "disc/p1/c.png", "disc/fe\u0301/d.png"
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert read(tmp_path) == [
        (names[3], "disc", "source/fé", True),
        (names[2], "disc", "source/p1", True),
        (names[0], "fémur", f"source/{names[0]}", True),
        (names[1], "fémur", "source/p1", True),
    ]
    rows = "IMAGE;Class;Patient;Split", "disc\\p1\\c.png;disc;1;test", "fémur/a.png;fe\u0301mur;;"
    (tmp_path / "images.csv").write_text("\n".join(rows), encoding="utf-8")
    assert read(tmp_path) == [
        (names[2], "disc", "source/1", False),
        (names[0], "fémur", f"source/{names[0]}", True),
    ]


def test_patients_are_held_out_by_their_names_and_no_class_loses_all(tmp_path):
    def read(share, split="", more=""):
        rows = [f"{n}.png,{'ab'[n % 2]},{n // 2},{split}" for n in range(20)]
        lines = "\n".join(["image,class,patient,split", *rows, more])
        (tmp_path / "images.csv").write_text(lines)
        return read_site(tmp_path, "source", True, share)

    assert all(record.train for record in read(0.0))
    held = {record.patient for record in read(0.3) if not record.train}
    assert held == {f"source/{n}" for n in (1, 4, 7)}
    assert all(record.train for record in read(0.3, "train"))
    kept = [record for record in read(0.3, more="x.png,c,1,") if record.train]
    assert len({r.patient for r in kept}) == 7 and classes_of(kept) == ("a", "b", "c")
    # each class gives its share
    more = "\n".join(f"r{n}.png,rare,r{n}," for n in range(5))
    assert classes_of(r for r in read(0.2, more=more) if not r.train) == ("a", "b", "rare")


@pytest.mark.parametrize(
    "rows, words",
    {
        "a/0.png,a,": "has images of a alone; a classifier tells two apart",
        "a/0.png,a,\nb/0.png,,": "line 3: image or class is empty",
        "a/0.png,a,\nb/0.png,A,": "line 3: the classes a and A differ by capitals alone",
        "a/0.png,a,\na/0.png,b,": r"line 3: a/0\.png is listed twice",
        "a/0.png,x/y,": "line 2: 'x/y' is no name for a class",
        "a/0.png,prediction,": "'prediction' is no name for a class",
        "../a/0.png,a,": r"line 2: \.\./a/0\.png: give the image's path below",
        "/a/0.png,a,": r"line 2: /a/0\.png: give the image's path below",
        "C:\\a\\0.png,a,": "line 2: C:.*: give the image's path below",
        "a\\..\\0.png,a,": "line 2: .*: give the image's path below",
        "a/0.png,a,maybe": "line 2: split is 'maybe', neither train nor test",
    }.items(),
)
def test_a_table_that_means_nothing_is_one_line(tmp_path, rows, words):
    (tmp_path / "images.csv").write_text(f"image,class,split\n{rows}\n")
    with refused(DatasetError, words):
        read_site(tmp_path, "source", train=True)


def test_folders_that_are_no_site_are_one_line(tmp_path):
    def fails(words, root=tmp_path):
        with refused(DatasetError, words):
            read_site(root, "source", train=True)

    fails("no such folder", tmp_path / "none")
    fails(r"neither images\.csv nor folders of images")
    (tmp_path / "nut").mkdir()
    fails("nut: no images in it")
    (tmp_path / "splits" / "train").mkdir(parents=True)
    (tmp_path / "splits" / "train" / "a.png").touch()
    fails("its folders are splits, not classes; give one, or images.csv", tmp_path / "splits")
    (tmp_path / "stray.png").touch()
    fails(r"stray\.png: lies beside the folders of the classes")


def test_prompts_are_made_of_class_names_by_a_template():
    assert prompts_of(["hex nut"], "one {class}.") == {"hex nut": "one hex nut."}
    for template in ("no place", "{class} {class}"):
        with refused(DatasetError, "says once where the class goes"):
            prompts_of(["a"], template)
