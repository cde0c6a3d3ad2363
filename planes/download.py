"""Fetch and unpack the two public datasets: `python -m planes.download --to data`.

Afterwards `read_spanish("data")` and `read_african("data")` find them. Needs about 5 GB there: the
archives stay beside what is unpacked, may be deleted, and are not fetched again if they are whole.
"""

import argparse
import http.client
import lzma
import shutil
import sys
import tarfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torchvision.datasets.utils import check_integrity, download_url, extract_archive

from planes.datasets import DatasetError, Record, read_african, read_spanish, require_images
from planes.record import SYNTHETIC, fetch_record


@dataclass(frozen=True)
class Archive:
    """A dataset's archive and how to tell that it is whole.

    md5: None where its publisher's is not known; then the checksums that .xz keeps of its own
        contents are tested
    folder: what it is unpacked to; the archive may have it as its top folder or not
    records: how many `read` finds in it, all with images
    """

    url: str
    md5: str | None
    size: str
    folder: str
    read: Callable[[Path], list[Record]]
    records: int

    @property
    def name(self) -> str:
        return self.url.rpartition("/")[2]


ARCHIVES: dict[str, Archive] = {
    "spanish": Archive(
        url="https://zenodo.org/records/3904280/files/FETAL_PLANES_ZENODO.zip",
        md5="2a5fcc2cefb789bcc0f6c1f73e0ea43f",
        size="2.1 GB",
        folder="FETAL_PLANES_ZENODO",
        read=read_spanish,
        records=10774,  # of 12400; the others are of the cervix
    ),
    "african": Archive(
        url="https://zenodo.org/records/7540448/files/Zenodo_dataset.tar.xz",
        md5=None,
        size="about 41 MB",
        folder="Zenodo_dataset",
        read=read_african,
        records=450,
    ),
}


def fetch(archive: Archive, to: str | Path) -> Path:
    """The folder of the dataset in `to`, complete: as it is, else unpacked from the archive there,
    else downloaded.

    DatasetError if that fails, in one line; nothing half-written is left. A folder that is there
    but incomplete is the user's and is not touched.
    """
    folder, file = Path(to) / archive.folder, Path(to) / archive.name
    if folder.exists():
        try:
            _require_complete(archive, folder)
        except DatasetError as error:
            raise DatasetError(
                f"{folder} is there but incomplete: {error}; move it away and run this again"
            ) from None
        return folder
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DatasetError(f"{to} cannot be made a folder ({error}); name another one") from None
    if not _whole(file, archive.md5):
        _download(archive, file)
    _unpack(archive, file, folder)
    return folder


def _download(archive: Archive, file: Path) -> None:
    part = file.with_name(f"{file.name}.part")
    try:
        # of a run that was killed: download_url would take it for the archive
        part.unlink(missing_ok=True)
        download_url(archive.url, file.parent, part.name)
        if not _whole(part, archive.md5):
            raise OSError("what came is damaged or something else")
        part.replace(file)
    except (OSError, RuntimeError, http.client.HTTPException) as error:
        by_hand = f"download it in a browser ({archive.size}), save it as {file} and run this again"
        raise DatasetError(f"{archive.url} cannot be fetched ({error}); {by_hand}") from None
    finally:
        _remove(part)


def _whole(file: Path, md5: str | None) -> bool:
    if md5 or not file.is_file():
        return check_integrity(file, md5)
    try:
        with lzma.open(file) as stream:
            while stream.read(1 << 20):
                pass
    except (lzma.LZMAError, EOFError):
        return False
    return True


def _unpack(archive: Archive, file: Path, folder: Path) -> None:
    scratch = folder.with_name(f".{folder.name}.part")
    try:
        _remove(scratch)
        extract_archive(file, scratch)
        unpacked = scratch / folder.name if (scratch / folder.name).is_dir() else scratch
        _require_complete(archive, unpacked)
        unpacked.rename(folder)
    except (
        OSError,
        EOFError,
        RuntimeError,
        DatasetError,
        tarfile.TarError,
        zipfile.BadZipFile,
    ) as error:
        raise DatasetError(
            f"{file} cannot be unpacked ({error}); make room, or delete it and run this again"
        ) from None
    finally:
        _remove(scratch)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _require_complete(archive: Archive, folder: Path) -> None:
    records = archive.read(folder)
    if len(records) != archive.records:
        raise DatasetError(
            f"its table lists {len(records)} images of the five planes, not {archive.records}"
        )
    require_images(records)


def parse_args(argv=None):
    parser = argparse.ArgumentParser(prog="python -m planes.download", description=__doc__)
    parser.add_argument(
        "--to", type=Path, required=True, help="folder for archives and datasets, made if need be"
    )
    parser.add_argument(
        "--only",
        choices=[*ARCHIVES, "synthetic"],
        help="one of the two, or the authors' own images",
    )
    return parser.parse_args(argv)


def main(args, archives: dict[str, Archive] = ARCHIVES):
    for name, archive in archives.items():
        if args.only in (None, name):
            folder = fetch(archive, args.to)
            sys.stdout.write(f"{name}: {archive.records} images of the five planes in {folder}\n")
    if args.only == "synthetic":
        files = fetch_record(SYNTHETIC, args.to / "synthetic")
        sys.stdout.write(
            f"synthetic: {len(files)} files of Zenodo {SYNTHETIC} in {args.to / 'synthetic'}\n"
        )


if __name__ == "__main__":
    try:
        main(parse_args())
    except DatasetError as error:
        sys.stderr.write(f"planes.download: {error}\n")
        sys.exit(2)
