"""Tables lose no row: quotation marks that do not close, line ends of all kinds, images that are
listed twice."""

import pytest

from planes.captions import prior_pairs
from planes.datasets import DatasetError, read_african, read_manifest, read_spanish, read_synthetic
from planes.tables import read_table

HEADER = "Image_name,Plane,Notes\n"
SPANISH = "Image_name;Patient_num;Plane;Train \n"
AFRICAN = "Patient_num,Plane,Train,Center,Filename\n"


def written(path, text):
    path.write_bytes(text.encode("utf-8"))
    return path


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize(
    "inside", ["\n", "\r\n", "\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c"]
)
def test_a_cell_in_quotation_marks_holds_any_line_end_and_costs_no_row(tmp_path, end, inside):
    rows = ["a,Other,fine", f'b,Other,"two{inside}lines"', "c,Other,", ""]
    table = read_table(
        written(tmp_path / "t.csv", HEADER.strip() + end + end.join(rows)), "Image_name", "Notes"
    )
    assert [row[1:] for row in table] == [("a", "fine"), ("b", f"two{inside}lines"), ("c", "")]
    line = 5 if inside in ("\n", "\r\n") else 4
    assert table[2][0] == f"{tmp_path / 't.csv'}, line {line}"


@pytest.mark.parametrize("separator", "\u2028\u2029\x85\x0b\x0c\x1c\x1d\x1e")
def test_a_line_end_that_csv_does_not_know_is_part_of_its_cell(tmp_path, separator):
    path = written(tmp_path / "t.csv", f"{HEADER}a,Other,left{separator}right\nb,Other,\n")
    assert [row[1:] for row in read_table(path, "Image_name")] == [("a",), ("b",)]


@pytest.mark.parametrize(
    ("rows", "line"),
    [
        ('a,Other,x\nb,Other,"open\nc,Other,\nd,Other,\n', 3),  # to the end of the file
        # shut by another cell's: not a quote alone
        ('a,Other,"open\nb,Other,\nc,Other,"shut"\nd,Other,\n', 2),
        ('a,Other,"open\nb,Other,\nc,Other,shut"\nd,Other,\n', 2),  # shut in order, with rows in it
        ('a,Other,"x"y\n', 2),
    ],
)
def test_quotation_marks_that_hold_rows_are_named_with_the_row_where_they_open(
    tmp_path, rows, line
):
    path = written(tmp_path / "t.csv", HEADER + rows)
    with pytest.raises(
        DatasetError, match=rf"t\.csv, line {line}: .*; are all quotation marks in pairs\?$"
    ):
        read_table(path, "Image_name")


def test_a_cell_of_a_hundred_thousand_lines_is_one_line_of_complaint(tmp_path):
    path = written(tmp_path / "t.csv", HEADER + 'a,Other,"' + "long\n" * 100_000)
    with pytest.raises(DatasetError, match=r"line 2: .*quotation marks"):
        read_table(path, "Image_name")


@pytest.mark.parametrize(
    ("again", "complaint"),
    [
        ("a;7;Fetal brain;1", r"line 4: a is listed twice, before in line 2; remove one$"),
        ("a;7;Other;1", r"line 4: a is listed as Other, but as brain in line 2"),
        (
            "a;7;Maternal cervix;1",
            r"line 4: a is listed as Maternal cervix, but as brain in line 2",
        ),
    ],
)
def test_an_image_that_the_spanish_table_lists_twice_is_refused(tmp_path, again, complaint):
    written(
        tmp_path / "FETAL_PLANES_DB_data.csv",
        f"{SPANISH}a;7;Fetal brain;1\nb;7;Fetal brain;1\n{again}\n",
    )
    with pytest.raises(DatasetError, match=complaint):
        read_spanish(tmp_path)


def test_the_african_table_may_use_a_name_in_two_countries_but_in_one_only_once(tmp_path):
    rows = "1,Fetal brain,0,Malawi,a\n1,Fetal brain,0,Egypt,a\n"
    table = written(tmp_path / "African_planes_database.csv", AFRICAN + rows)
    assert len(read_african(tmp_path)) == 2
    written(table, f"{AFRICAN}{rows}2,Fetal femur,0,Egypt,a\n")
    with pytest.raises(
        DatasetError, match=r"line 4: Egypt/a is listed as Fetal femur, but as brain in line 3"
    ):
        read_african(tmp_path)


def test_a_manifest_that_lists_an_image_twice_is_refused_as_a_list_and_as_synthetic_images(
    tmp_path,
):
    path = written(
        tmp_path / "manifest.csv", "image,plane,sampler\na.png,brain,euler\na.png,brain,unipc\n"
    )
    with pytest.raises(DatasetError, match=r"line 3: a\.png is listed twice"):
        read_synthetic(path)
    path = written(tmp_path / "list.csv", "Image_name,Plane\na,Other\na,Other\n")
    with pytest.raises(DatasetError, match="line 3: a is listed twice"):
        read_manifest(path, [])


def test_the_images_that_dreambooth_holds_on_to_are_read_by_the_same_rules(tmp_path):
    (tmp_path / "a.png").touch()
    path = written(tmp_path / "manifest.csv", 'image,prompt\na.png,"a photo, of a brain"\n')
    assert prior_pairs(path) == [(tmp_path / "a.png", "a photo, of a brain")]
    written(path, 'image,prompt\na.png,"a photo\nb.png,two\n')
    with pytest.raises(DatasetError, match=r"line 2: .*quotation marks"):
        prior_pairs(path)
    written(path, "image,caption\na.png,x\n")
    with pytest.raises(DatasetError, match="needs the columns image, prompt"):
        prior_pairs(path)
