"""manifest.csv: a row for each image of a folder, which the classifiers read."""

import csv
import io
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path

from ldm.webui.shots import Shot
from planes.tables import DatasetError, read_table

COLUMNS = [field.name for field in fields(Shot)]


def other_rows(
    shots: Sequence[Shot], folder: Path, classes: Collection[str] = (), say: Callable = print
) -> list[dict[str, str]]:
    """The rows of the manifest.csv that is there which stay: those of other planes and samplers
    than `shots` have.

    Of theirs none does: a run of fewer images means fewer. Nor does a class that is none of
    `classes`, where such are given, as it was renamed: `say` is told. Raises DatasetError where it
    cannot be read: what stands in it would be lost.
    """
    before, made = folder / "manifest.csv", {(str(shot.plane), shot.sampler) for shot in shots}
    if not before.exists():
        return []
    try:
        rows = [
            dict(zip(COLUMNS, cells)) for _, *cells in read_table(before, *COLUMNS, strip=False)
        ]
    except DatasetError as error:
        raise DatasetError(f"{error}; mend or remove it, or give another --out") from None
    if gone := {row["plane"] for row in rows if classes} - {*classes, "prompt"}:
        names = ", ".join(sorted(gone))
        say(f"{before}: no prompt is of {names}: their rows go, their images stay")
    return [
        row
        for row in rows
        if (row["plane"], row["sampler"]) not in made and row["plane"] not in gone
    ]


def manifest_text(shots: Sequence[Shot], others: Sequence[Mapping[str, str]], folder: Path) -> str:
    """The table of these images behind those of an earlier run into the folder, as long as their
    files are there."""
    table = io.StringIO()
    writer = csv.DictWriter(table, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(row for row in others if (folder / row["image"]).is_file())
    writer.writerows(asdict(shot) for shot in shots)
    return table.getvalue()
