"""manifest.csv: a row for each image of a folder, which the classifiers read."""

import csv
import io
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path

from ldm.webui.shots import Shot

COLUMNS = [field.name for field in fields(Shot)]


def manifest_text(shots: Sequence[Shot], folder: Path) -> str:
    """The table of these images, and of those that an earlier run made into the folder for other prompts.

    Of the planes and samplers of `shots` the rows of the manifest.csv that is there are gone: a run of fewer images
    means fewer. Of others they stay as long as their images do.
    """
    before = folder / "manifest.csv"
    rows, made = [], {(shot.plane, shot.sampler) for shot in shots}
    if before.is_file():
        with before.open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
    rows = [row for row in rows if [*row] == COLUMNS and (row["plane"], row["sampler"]) not in made]
    table = io.StringIO()
    writer = csv.DictWriter(table, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(row for row in rows if (folder / row["image"]).is_file())
    writer.writerows(asdict(shot) for shot in shots)
    return table.getvalue()
