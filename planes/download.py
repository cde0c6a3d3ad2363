"""Fetch and unpack the public datasets from Zenodo: `python -m planes.download --to data`.

Afterwards `read_spanish("data")` and `read_african("data")` find them. Needs about 5 GB there: the
archives stay beside what is unpacked, and may be deleted.
"""

import argparse
import hashlib
import json
import shutil
import sys
import urllib.request
from dataclasses import dataclass
from pathlib import Path

from harness.files import sha256, walk
from harness.script import run
from planes.tables import DatasetError

API = "https://zenodo.org/api/records"
SYNTHETIC = 13228158
LIST = "synthetic_train_5000.csv"
"""The authors' list of their synthetic images: in the record, or else in their repository, beside
their other lists."""

MARK = ".unpacked"
"""In a folder that was made here: the sums of its archives."""

ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.xz")
SECONDS = 60  # without a byte, after which a connection counts as lost


@dataclass(frozen=True)
class Source:
    """A record of Zenodo.

    folder: what it is unpacked to; its archive may have it as its top folder or not
    images: how many there are at least
    file: the one that is wanted; None: all
    """

    number: int
    folder: str
    images: int
    file: str | None = None


SOURCES: dict[str, Source] = {
    "spanish": Source(3904280, "FETAL_PLANES_ZENODO", 12400, "FETAL_PLANES_ZENODO.zip"),  # 2.1 GB
    "african": Source(7540448, "Zenodo_dataset", 450, "Zenodo_dataset.tar.xz"),  # 41 MB
    "synthetic": Source(SYNTHETIC, "synthetic", 5000),
}


def fetch_synthetic(to: Path, lists: Path | None, api: str = API) -> Path:
    """The list of the authors' synthetic images below the folder `to`, with the images, fetched
    where need be.

    lists: a folder that has LIST, which is taken where the record has none
    Raises DatasetError as `fetch`, and where there is no list.
    """
    folder = fetch(SOURCES["synthetic"], to, api)
    found = [*sorted(to.rglob(LIST)), *(lists.glob(LIST) if lists else ())]
    if not found:
        raise DatasetError(
            f"{to}: has no {LIST} that says which image is what; give --manifests, the folder"
            " with it"
        )
    if found[0] != folder / LIST:
        shutil.copyfile(found[0], folder / LIST)
    return folder / LIST


def fetch(source: Source, to: Path, api: str = API) -> Path:
    """The folder of the source in `to`, complete: as it is, else unpacked from the archives there,
    else downloaded.

    A download that is cut off stays as .part, and goes on from there the next time; what is
    unpacked appears when it is complete, and is unpacked again where images are gone or an archive
    beside it is another. Raises DatasetError, one line: what is wrong, and what to do. An
    incomplete folder without MARK is the user's and is not touched.
    """
    folder = to / source.folder
    if folder.exists():
        lacking, mark = _lacking(source, folder), folder / MARK
        known = json.loads(mark.read_text()) if mark.exists() else {}
        if lacking and not known:
            raise DatasetError(f"{folder}: {lacking}; move it away and run this again")
        there = [to / name for name in known if (to / name).is_file()]
        if not lacking and all(known[path.name] == sha256(path) for path in there):
            return folder
    to.mkdir(parents=True, exist_ok=True)
    try:
        with urllib.request.urlopen(f"{api}/{source.number}", timeout=SECONDS) as answer:
            listed = {file["key"]: file for file in json.load(answer)["files"]}
        files = [to / name for name in ([source.file] if source.file else listed)]
        for file in files:
            if not file.is_file():
                _download(listed[file.name], file)
    except Exception as error:  # a server may answer anything at all
        raise DatasetError(
            f"{source.file or source.folder} cannot be fetched ({error}); run this again to go on,"
            f" or get https://zenodo.org/records/{source.number} in a browser and unpack it as"
            f" {folder}"
        ) from None
    _unpack(source, [file for file in files if file.name.endswith(ARCHIVES)], folder)
    return folder


def _download(entry: dict, path: Path) -> None:
    """The file that Zenodo lists so, whole by its checksum. Raises OSError."""
    part = path.with_name(f"{path.name}.part")
    begun = part.stat().st_size if part.exists() else 0
    if begun < entry["size"]:
        headers = {"Range": f"bytes={begun}-"}
        request = urllib.request.Request(entry["links"]["self"], headers=headers)
        with (
            urllib.request.urlopen(request, timeout=SECONDS) as answer,
            # what is not sent in part begins at its beginning
            part.open("ab" if answer.status == 206 else "wb") as file,
        ):
            shutil.copyfileobj(answer, file)
        if part.stat().st_size < entry["size"]:
            raise OSError(f"{path.name} was cut off after {part.stat().st_size:,} bytes")
    with part.open("rb") as file:
        whole = f"md5:{hashlib.file_digest(file, 'md5').hexdigest()}" == entry["checksum"]
    if not whole:
        part.unlink()
        raise OSError(f"{path.name} came damaged, and was removed")
    part.replace(path)


def _unpack(source: Source, archives: list[Path], folder: Path) -> None:
    scratch = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(scratch, ignore_errors=True)  # of a run that was killed
    try:
        for archive in archives:
            shutil.unpack_archive(archive, scratch)
        unpacked = scratch / folder.name if (scratch / folder.name).is_dir() else scratch
        if lacking := _lacking(source, unpacked):
            raise OSError(lacking)
        (unpacked / MARK).write_text(json.dumps({path.name: sha256(path) for path in archives}))
        if folder.exists():
            shutil.copytree(unpacked, folder, dirs_exist_ok=True)
        else:
            unpacked.rename(folder)
    except Exception as error:  # an archive may be broken in any way at all
        names = ", ".join(map(str, archives))
        raise DatasetError(
            f"{names} cannot be unpacked ({error}); make room, or delete it and run this again"
        ) from None
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _lacking(source: Source, folder: Path) -> str:
    """What a folder lacks, in words; empty where it is complete."""
    count = len(walk(folder).images)
    return "" if count >= source.images else f"{count:,} of {source.images:,} images are there"


def parse_args(argv=None):
    parser = argparse.ArgumentParser(prog="python -m planes.download", description=__doc__)
    add = parser.add_argument
    add("--to", type=Path, required=True, help="folder for archives and datasets, made if need be")
    add("--only", choices=SOURCES, help="one of the two, or the authors' images")
    return parser.parse_args(argv)


def main(args):
    for name in [args.only] if args.only else ["spanish", "african"]:
        sys.stdout.write(f"{name}: {fetch(SOURCES[name], args.to)}\n")


if __name__ == "__main__":
    run(parse_args, main, DatasetError)
