"""Tables, text and JSON as datasets and other tools write them: no row is lost, no half character
let in."""

import csv
import io
import json
from pathlib import Path


class DatasetError(ValueError):
    """A dataset, list or selection that cannot be had as asked for, told in one line."""


def read_table(
    path: Path, *columns: str, optional: tuple[str, ...] = (), strip: bool = True
) -> list[tuple[str, ...]]:
    """(where it stands, a cell for each of `columns`, one for each of `optional`) for each row that
    is not blank.

    columns: their headers ("this|or that"), in any capitals
    optional: headers of columns that may be absent, whose cells are then empty
    strip: where False, spaces around cells are theirs

    Takes `;` or `,`, any line ends, a byte order mark, and spaces around headers and cells: the
    real files have all. A cell in quotation marks may hold line ends.

    Raises DatasetError where the file is no such table, a row has more or fewer cells than there
    are headers, or quotation marks hold what looks like rows.
    """
    # as csv counts them: at \n, \r and \r\n, at no other line end
    lines = list(io.StringIO(read_text(path), newline=""))
    delimiter = max(",;", key=lines[0].count) if lines else ","
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    begin, header, rows = 1, [], []
    try:
        for raw in reader:
            cells = [cell.strip() for cell in raw] if strip or begin == 1 else raw
            if begin == 1:
                header = cells
            elif any(cells):
                rows.append((begin, cells))
            held = lines[begin : reader.line_num]
            if any(line.count(delimiter) >= max(len(header) - 1, 1) for line in held):
                raise csv.Error(f"quotation marks hold the rows up to line {reader.line_num}")
            begin = reader.line_num + 1
    except csv.Error as error:
        raise DatasetError(
            f"{path}, line {begin}: {error}; are all quotation marks in pairs?"
        ) from None

    names = [name.casefold() for name in header]
    found = [next((n for n in c.casefold().split("|") if n in names), None) for c in columns]
    if None in found:
        needed, had = ", ".join(columns).replace("|", " or "), ", ".join(header) or "none"
        raise DatasetError(
            f"{path}: needs the columns {needed}, but has {had}; separate columns by ; or ,"
        )
    if not rows:
        raise DatasetError(f"{path}: no images listed in it")
    table = []
    for line, cells in rows:
        where, row = f"{path}, line {line}", dict(zip(names, cells))
        if len(cells) != len(header):
            raise DatasetError(f"{where}: {len(cells)} cells under {len(header)} headers")
        table.append((where, *(row[n] for n in found), *(row.get(n, "") for n in optional)))
    return table


def read_text(path: Path) -> str:
    """A text file in UTF-8, with its own line ends and without a byte order mark."""
    try:
        return path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise DatasetError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DatasetError(f"{path}: cannot be read as text in UTF-8 ({error})") from None


def from_json(text: str) -> object:
    """json.loads; a ValueError also for half a character, such as "\\ud800", which no file can
    hold."""
    value = json.loads(text)
    json.dumps(value, ensure_ascii=False).encode("utf-8")
    return value
