"""A record of Zenodo, file by file: goes on where it was cut off, and takes nothing whose checksum
is another.

Here for the authors' 5,000 synthetic images, record 13228158, whose files are listed by Zenodo
itself.
"""

import http.client
import json
import shutil
import urllib.error
import urllib.request
from pathlib import Path

from torchvision.datasets.utils import check_integrity, extract_archive

from planes.tables import DatasetError

API = "https://zenodo.org/api/records"
SYNTHETIC = 13228158
LIST = "synthetic_train_5000.csv"
"""The authors' list of their synthetic images: in the record, or else in their repository, beside
their other lists."""

ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.xz")
CHUNK, SECONDS = 1 << 20, 60


def fetch_synthetic(to: Path, lists: Path | None, api: str = API) -> Path:
    """The list of the authors' synthetic images in the folder `to`, with the images below it,
    fetched where need be.

    lists: a folder that has LIST, which is taken where the record has none
    Raises DatasetError as `fetch_record`, and where there is no list.
    """
    fetch_record(SYNTHETIC, to, api)
    found = next(iter(sorted(to.rglob(LIST))), None) or (
        lists / LIST if lists and (lists / LIST).is_file() else None
    )
    if found is None:
        raise DatasetError(
            f"{to}: has no {LIST} that says which image is what; give --manifests, the folder"
            " with it"
        )
    if found != to / LIST:
        shutil.copyfile(found, to / LIST)
    return to / LIST


def fetch_record(number: int, to: Path, api: str = API) -> list[Path]:
    """All files of a record in the folder `to`, each whole by its checksum, archives unpacked
    beside themselves.

    A file that is cut off stays as .part, and what is missing of it is asked for the next time.
    Raises DatasetError, one line: what cannot be fetched, and what to do.
    """
    listed = f"{api}/{number}"
    try:
        with urllib.request.urlopen(listed, timeout=SECONDS) as answer:
            files = [
                (f["key"], f["checksum"], f["links"]["self"]) for f in json.load(answer)["files"]
            ]
    except (OSError, ValueError, LookupError, TypeError, http.client.HTTPException) as error:
        raise DatasetError(
            f"{listed}: Zenodo does not say what is in the record ({error}); try again later"
        ) from None
    to.mkdir(parents=True, exist_ok=True)
    paths = []
    for key, checksum, url in files:
        if Path(key).name != key or not checksum.startswith("md5:"):
            raise DatasetError(
                f"{listed}: {key} ({checksum}) is no file with an md5; fetch it by hand into {to}"
            )
        path, md5 = to / key, checksum.removeprefix("md5:")
        if not check_integrity(path, md5):
            _fetch(url, path, md5)
        if key.endswith(ARCHIVES) and not (done := to / f".{key}.unpacked").exists():
            try:
                extract_archive(path, to)
            except Exception as error:  # an archive may be broken in any way at all
                raise DatasetError(
                    f"{path}: cannot be unpacked ({error}); make room, and run this again"
                ) from None
            done.touch()
        paths.append(path)
    return paths


def _fetch(url: str, path: Path, md5: str) -> None:
    part = path.with_name(f"{path.name}.part")
    begun = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={begun}-"} if begun else {})
    try:
        with urllib.request.urlopen(request, timeout=SECONDS) as answer:
            goes_on, size = answer.status == 206, int(answer.headers.get("Content-Length") or 0)
            with part.open(
                "ab" if goes_on else "wb"
            ) as file:  # what is not asked for in part is sent from its beginning
                shutil.copyfileobj(answer, file, CHUNK)
            if part.stat().st_size < size + begun * goes_on:
                raise OSError("the connection was closed")
    except urllib.error.HTTPError as error:
        if error.code != 416:  # all of it is there, or more: the checksum will tell
            raise DatasetError(f"{url}: {error}; try again later") from None
    except (OSError, http.client.HTTPException) as error:
        size = part.stat().st_size if part.exists() else 0
        raise DatasetError(
            f"{url}: cut off after {size:,} bytes ({error}); run this again to go on"
        ) from None
    if not check_integrity(part, md5):
        part.unlink()
        raise DatasetError(f"{url}: what came is damaged, and was removed; run this again")
    part.replace(path)
