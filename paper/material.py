"""The real images of a reproduction: the paper's datasets, two sites of a user's own, or phantoms
of two sites.

Read from tables and folders alone, so that --plan works where only some of the images are.
"""

import hashlib
import json
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path

from harness.files import sha256
from paper.plan import MANIFESTS, Row
from planes import PAPER_COUNTS, PLANES
from planes.datasets import (
    DatasetError,
    Record,
    balanced,
    read_african,
    read_manifest,
    read_spanish,
)
from planes.phantoms.phantom import write_african_layout, write_spanish_layout
from planes.sites import classes_of, read_site

PHANTOMS = {  # images of each plane at site A; patients per country at site B
    "train": {plane: round(count / 10) for plane, count in PAPER_COUNTS.items()},
    "patients": 25,
}
TABLES = ("FETAL_PLANES_DB_data.csv", "African_planes_database.csv")


def make_phantoms(out: Path, seed: int, phantoms: Mapping[str, object]) -> tuple[Path, Path]:
    """Two sites in place of the two datasets, in `out`; not made again. phantoms: as PHANTOMS."""
    first, second = out / "spanish", out / "african"
    stamp, settings = out / "args.json", json.dumps({**phantoms, "seed": seed})
    if not stamp.exists() or stamp.read_text(encoding="utf-8") != settings:
        write_spanish_layout(first, phantoms["train"], test=0, seed=seed)
        write_african_layout(second, patients=phantoms["patients"], seed=seed)
        stamp.write_text(settings, encoding="utf-8")
    return first, second


class Selections:
    """The images that rows are made of.

    roots: of the first site, that is trained on, and of the second, that is tested on
    manifests: the authors' lists, by kind
    per_plane: images of each class, by kind, where there is no list; None: all. Of a user's own
        site at most as many as its rarest class has
    own: are they a user's own sites (`planes.sites`), and not in the layouts of the paper's
        datasets?
    """

    def __init__(
        self,
        roots: tuple[Path | None, Path | None],
        manifests: Mapping[str, Path],
        per_plane: Mapping[str, int | None],
        seed: int,
        own: bool = False,
    ):
        self.roots, self.manifests, self.per_plane, self.seed, self.own = (
            roots,
            manifests,
            per_plane,
            seed,
            own,
        )
        self.known: dict[str, list[Record]] = {}
        self.digests: dict[str, str] = {}

    @cached_property
    def first(self) -> list[Record]:
        return (
            read_site(self.roots[0], "source", train=True)
            if self.own
            else read_spanish(self.roots[0])
        )

    @cached_property
    def second(self) -> list[Record]:
        return (
            read_site(self.roots[1], "target", train=False)
            if self.own
            else read_african(self.roots[1])
        )

    @cached_property
    def classes(self) -> tuple[str, ...]:
        return classes_of(self.first) if self.own else PLANES

    def flags(self, kind: str) -> list[object]:
        """Those of a script that choose the first site's images of this kind."""
        flags = ["--source" if self.own else "--spanish", self.roots[0]]
        if kind in self.manifests:
            return [*flags, "--manifest", self.manifests[kind]]
        count = self.count(kind)
        return [*flags, "--per-plane", count] if count else flags

    def count(self, kind: str) -> int | None:
        """Images of each class, of this kind; None: all there are."""
        count = self.per_plane[kind]
        if not self.own or count is None:
            return count
        train = [record.plane for record in self.first if record.train]
        return min(count, *(train.count(name) for name in self.classes))

    def spanish(self, kind: str) -> list[Record]:
        """The first site's images of this kind ("all", "balanced", "lora"): by the list, or drawn
        by the same rule."""
        if kind not in self.known:
            train = [record for record in self.first if record.train]
            if kind in self.manifests:
                self.known[kind] = read_manifest(self.manifests[kind], self.first)
            else:
                count = self.count(kind)
                self.known[kind] = (
                    balanced(train, count, self.seed, self.classes) if count else train
                )
        return self.known[kind]

    def african(self, train: bool) -> list[Record]:
        """The second site's images for training or for the test."""
        return [record for record in self.second if record.train is train]

    def digest(self, kind: str) -> str:
        """One hash of the images of a kind, or of "african", and of what the tables say of them."""
        if kind not in self.digests:
            records = (
                self.spanish(kind)
                if kind != "african"
                else self.african(train=True) + self.african(train=False)
            )
            lines = (
                f"{r.plane} {r.patient} {r.center} {r.train} {r.name} {sha256(r.path)}\n"
                for r in records
            )
            self.digests[kind] = hashlib.sha256("".join(lines).encode()).hexdigest()
        return self.digests[kind]

    def counts(self, row: Row) -> tuple[int | None, int | None]:
        """Training images of a row from the first and the second site; None where the table is not
        there."""
        counts = []
        for wanted, images in (
            (row.data.spanish, lambda: self.spanish(row.data.spanish)),
            (row.data.african, lambda: self.african(train=True)),
        ):
            try:
                counts.append(len(images()) if wanted else 0)
            except DatasetError:
                counts.append(None)
        return counts[0], counts[1]

    def tables(self) -> list[Path]:
        """The tables that say what is in the two folders."""
        names = ("images.csv",) * 2 if self.own else TABLES
        return [root / name for root, name in zip(self.roots, names)]


def lists(folder: Path | None) -> dict[str, Path]:
    """The authors' lists of images in a folder, by kind."""
    return {kind: folder / name for kind, name in MANIFESTS.items()} if folder else {}
