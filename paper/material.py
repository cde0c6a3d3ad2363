"""The real images of a reproduction: the paper's datasets, two sites of a user's own, or phantoms
of two sites.

Read from tables and folders alone, so that --plan works where only some of the images are.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

from harness import processes
from harness.files import sha256, told_apart, write_text
from paper.plan import Row
from planes import PAPER_COUNTS, PLANES
from planes.datasets import Record, balanced, read_african, read_manifest, read_spanish
from planes.phantoms.phantom import write_african_layout, write_spanish_layout
from planes.sites import classes_of, has_patients, read_site

PHANTOMS = {  # images of each plane at site A; patients per country at site B
    "train": {plane: round(count / 10) for plane, count in PAPER_COUNTS.items()},
    "patients": 25,
}
MANIFESTS = {  # the authors' lists of the Spanish images
    "all": "all_train_no_cer.csv",
    "balanced": "spain_train_1150_balanced.csv",
    "lora": "lora_train_data.csv",
}


def make_phantoms(out: Path, seed: int) -> tuple[Path, Path]:
    """Two sites in place of the two datasets, in `out`; not made again.

    Of several processes each is to call it; the first makes one site, the last the other.
    """
    first, second = out / "spanish", out / "african"
    stamp, settings = out / "args.json", json.dumps({**PHANTOMS, "seed": seed})
    if not stamp.exists() or stamp.read_text(encoding="utf-8") != settings:
        processes.barrier()  # all have looked
        if processes.is_first():
            stamp.unlink(missing_ok=True)
            write_spanish_layout(first, PHANTOMS["train"], test=0, seed=seed)
        if processes.rank() == processes.size() - 1:
            write_african_layout(second, patients=PHANTOMS["patients"], seed=seed)
        processes.barrier()
        if processes.is_first():
            write_text(stamp, settings)
    return first, second


@dataclass(eq=False)
class Selections:
    """The images that rows are made of.

    roots: of the source, that is trained on, and of the target, that is tested on
    lists: a folder with the authors' lists (MANIFESTS)
    per_plane: where there is none: source images of each class, by kind; None: all. Of a user's own
        site at most as many as its rarest class has
    own: are they a user's own sites (`planes.sites`), and not in the layouts of the paper's
        datasets?
    phantoms: are they phantoms of site A and site B?
    """

    roots: tuple[Path, Path]
    lists: Path | None
    per_plane: Mapping[str, int | None]
    seed: int
    own: bool = False
    phantoms: bool = False

    @cached_property
    def held_out(self) -> float:
        """The share of an own source's patients that no stage trains on, who tell how well a row
        does at home; none where its table names a split or it is small."""
        every = read_site(self.roots[0], "source", train=True) if self.own else []
        enough = 10 if has_patients(every) else 40
        many = len({record.patient for record in every}) >= enough
        return 0.2 if many and all(record.train for record in every) else 0.0

    @cached_property
    def first(self) -> list[Record]:
        root = self.roots[0]
        return read_site(root, "source", True, self.held_out) if self.own else read_spanish(root)

    @cached_property
    def second(self) -> list[Record]:
        root = self.roots[1]
        return read_site(root, "target", train=False) if self.own else read_african(root)

    @property
    def names(self) -> list[str]:
        """What the two are called."""
        return ["site A", "site B"] if self.phantoms else told_apart(*self.roots)

    @cached_property
    def classes(self) -> tuple[str, ...]:
        return classes_of(self.first) if self.own else PLANES

    def flags(self, kind: str) -> list[object]:
        """Those of a script that choose the source's images of this kind."""
        flags = ["--source" if self.own else "--spanish", self.roots[0]]
        flags += ["--held-out", self.held_out] if self.held_out else []
        if self.lists:
            return [*flags, "--manifest", self.lists / MANIFESTS[kind]]
        count = self.count(kind)
        return [*flags, "--per-plane", count] if count else flags

    def count(self, kind: str) -> int | None:
        """Images of each class, of this kind; None: all there are."""
        count = self.per_plane[kind]
        if not self.own or count is None:
            return count
        train = [record.plane for record in self.first if record.train]
        return min(count, *(train.count(name) for name in self.classes))

    @cache  # noqa: B019 (one Selections a run)
    def images(self, kind: str) -> list[Record]:
        """The source's images of this kind ("all", "balanced", "lora"): by the list, or drawn by
        the same rule; or all of the "target"."""
        if kind == "target":
            return self.target(train=True) + self.target(train=False)
        if self.lists:
            return read_manifest(self.lists / MANIFESTS[kind], self.first)
        train, count = [record for record in self.first if record.train], self.count(kind)
        return balanced(train, count, self.seed, self.classes) if count else train

    def can_train(self, row: Row) -> bool:
        """Has the target the training images that a row asks for? On these alone no class of the
        test may be new."""
        if not row.data.target:
            return True
        train, test = ({record.plane for record in self.target(t)} for t in (True, False))
        return bool(train) and bool(row.data.source or train >= test)

    def target(self, train: bool) -> list[Record]:
        """The target's images for training or for the test."""
        return [record for record in self.second if record.train is train]

    @cache  # noqa: B019
    def digest(self, kind: str) -> str:
        """One hash of the images of a kind and of what the tables say of them."""
        lines = (
            f"{r.plane} {r.patient} {r.center} {r.train} {r.name} {sha256(r.path)}\n"
            for r in self.images(kind)
        )
        return hashlib.sha256("".join(lines).encode()).hexdigest()
