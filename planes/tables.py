"""Tables as datasets and other tools write them: CSV by ; or , in which no row is lost."""

import csv
import io
from pathlib import Path


class DatasetError(ValueError):
    """A dataset, list or selection that cannot be had as asked for, told in one line."""


def read_table(path: Path, *columns: str, strip: bool = True) -> list[tuple[str, ...]]:
    """(where it stands, a cell for each of `columns`) for each row that is not blank.

    columns: their headers ("this|or that")

    Takes `;` or `,`, any line ends, a byte order mark, and spaces around headers and cells: the
    real files have all. A cell in quotation marks may hold line ends. strip: where False, spaces
    around cells are theirs.

    Raises DatasetError where the file is no such table, a row has more or fewer cells than there
    are headers, or quotation marks hold what looks like rows.
    """
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise DatasetError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DatasetError(f"{path}: cannot be read as CSV in UTF-8 ({error})") from None
    # as csv counts them: at \n, \r and \r\n, at no other line end
    lines = list(io.StringIO(text, newline=""))
    delimiter = max(",;", key=lines[0].count) if lines else ","
    table, begin = [], 1
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    try:
        for cells in reader:
            table.append((begin, [cell.strip() for cell in cells] if strip or not table else cells))
            if any(
                line.count(delimiter) >= max(len(table[0][1]) - 1, 1)
                for line in lines[begin : reader.line_num]
            ):
                raise csv.Error(
                    f"a cell in quotation marks holds the rows up to line {reader.line_num}"
                )
            begin = reader.line_num + 1
    except csv.Error as error:
        raise DatasetError(
            f"{path}, line {begin}: {error}; are all quotation marks in pairs?"
        ) from None

    header = table[0][1] if table else []
    found = [
        next((name for name in column.split("|") if name in header), None) for column in columns
    ]
    if None in found:
        needed, had = ", ".join(columns).replace("|", " or "), ", ".join(header) or "none"
        raise DatasetError(
            f"{path}: needs the columns {needed}, but has {had}; separate columns by ; or ,"
        )
    rows = []
    for line, cells in table[1:]:
        if not any(cells):
            continue
        if len(cells) != len(header):
            raise DatasetError(
                f"{path}, line {line}: {len(cells)} cells under {len(header)} headers"
            )
        rows.append((f"{path}, line {line}", *(cells[header.index(name)] for name in found)))
    if not rows:
        raise DatasetError(f"{path}: no images listed in it")
    return rows
