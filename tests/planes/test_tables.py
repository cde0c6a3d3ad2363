"""Tables lose no row: quotation marks that do not close, line ends of all kinds."""

import pytest
from shorthand import refused

from planes.datasets import DatasetError
from planes.tables import read_table

HEADER = "Image_name,Plane,Notes\n"


def written(path, text):
    path.write_bytes(text.encode("utf-8"))
    return path


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("inside", ["\n", "\r\n", "\u2028", "\x85", "\x0b", "\x1c"])
def test_a_cell_in_quotation_marks_holds_any_line_end_and_costs_no_row(tmp_path, end, inside):
    rows = [HEADER.strip(), "a,Other,fine", f'b,Other,"two{inside}lines"', "c,Other, x", ""]
    path = written(tmp_path / "t.csv", end.join(rows))
    cells = [("a", "fine", ""), ("b", f"two{inside}lines", ""), ("c", "x", "")]
    lines = (2, 3, 5 if inside in ("\n", "\r\n") else 4)
    assert read_table(path, "file|Image_name", "Notes", optional=("split",)) == [
        (f"{path}, line {line}", *row) for line, row in zip(lines, cells)
    ]
    assert read_table(path, "Notes", strip=False)[2][1] == " x"


@pytest.mark.parametrize(
    "rows, line",
    [
        ('a,Other,x\nb,Other,"open\nc,Other,\nd,Other,\n', 3),  # to the end of the file
        # shut by another cell's: not a quote alone
        ('a,Other,"open\nb,Other,\nc,Other,"shut"\nd,Other,\n', 2),
        ('a,Other,"open\nb,Other,\nc,Other,shut"\nd,Other,\n', 2),  # shut in order, with rows in it
        ('a,Other,"x"y\n', 2),
        ('a,Other,"' + "long\n" * 100_000, 2),
    ],
)
def test_quotation_marks_that_hold_rows_are_named_with_the_row_where_they_open(
    tmp_path, rows, line
):
    path = written(tmp_path / "t.csv", HEADER + rows)
    with refused(DatasetError, rf"t\.csv, line {line}: .*; are all quotation marks in pairs\?$"):
        read_table(path, "Image_name")
