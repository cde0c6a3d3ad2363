"""Fetching records of Zenodo from a server on the loopback address that speaks as Zenodo does: cut
off, resumed, verified, unpacked."""

import hashlib
import io
import json
import runpy
import shutil
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
from shorthand import DATA, Answers, real_data, refused, served

from planes import PLANES
from planes.datasets import DatasetError, read_african, read_spanish, read_synthetic, require_images
from planes.download import LIST, SOURCES, fetch, fetch_synthetic
from planes.phantoms.phantom import write_african_layout, write_spanish_layout

SMALL = {
    "spanish": replace(SOURCES["spanish"], images=5),
    "african": replace(SOURCES["african"], images=18),
}


class Zenodo:
    """Files by name, of which every record's listing tells; `sum`: a wrong one; `cut`: bytes after
    which the connection ends; `ranges`: what was asked for."""

    def __init__(self):
        self.files, self.sum, self.cut, self.ranges, zenodo = {}, None, None, [], self

        class Handler(Answers):
            def do_GET(self):
                name = self.path.rpartition("/")[2]
                if name.isdigit():
                    return self.answer(200, {}, zenodo.listing().encode())
                begin = int(self.headers["Range"].removeprefix("bytes=").rstrip("-"))
                zenodo.ranges.append((name, begin))
                self.answer(206, {}, zenodo.files[name][begin:], zenodo.cut)

        self.handler = Handler

    def listing(self):
        files = [
            {
                "key": name,
                "size": len(body),
                "checksum": f"md5:{self.sum or hashlib.md5(body).hexdigest()}",
                "links": {"self": f"{self.api}/files/{name}"},
            }
            for name, body in self.files.items()
        ]
        return json.dumps({"files": files})


@pytest.fixture
def zenodo(monkeypatch, tmp_path_factory, four_pixels):
    """Small archives in the real layouts: a .zip without a top folder, a .tar.xz with one."""
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    root, zenodo = tmp_path_factory.mktemp("made"), Zenodo()
    write_spanish_layout(root / "spanish", train=1, test=0, seed=0)
    write_african_layout(root / "Zenodo_dataset", patients=1, seed=0)
    for name, *what in (
        ("spanish", "zip", root / "spanish"),
        ("african", "xztar", root, "Zenodo_dataset"),
    ):
        archive = shutil.make_archive(str(root / name), *what)
        zenodo.files[SMALL[name].file] = Path(archive).read_bytes()
    zenodo.files["notes.txt"] = b"not wanted"
    with served(zenodo.handler) as address:
        zenodo.api = f"{address}/api/records"
        yield zenodo


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("name, read", [("spanish", read_spanish), ("african", read_african)])
def test_a_dataset_is_fetched_once_to_where_its_reader_finds_it(zenodo, tmp_path, name, read):
    source, to = SMALL[name], tmp_path / "new" / "data"
    folder = fetch(source, to, zenodo.api)
    assert names(to) == sorted([source.folder, source.file]) and folder == to / source.folder
    require_images(read(to))
    assert len(read(to)) == source.images
    (folder / "note.txt").touch()
    assert fetch(source, to, zenodo.api) == folder and (folder / "note.txt").exists()  # left alone
    folder.rename(to / "elsewhere")
    assert fetch(source, to, zenodo.api).is_dir()  # unpacked again
    assert zenodo.ranges == [(source.file, 0)]
    # as where images are gone, or the archive is another
    path, mark = read(to)[0].path, folder / ".unpacked"
    body = path.read_bytes()
    for change in (path.unlink, lambda: mark.write_text(f'{{"{source.file}": "0"}}')):
        change()
        fetch(source, to, zenodo.api)
        assert path.read_bytes() == body and '"0"' not in mark.read_text()
        path.write_bytes(b"of an older archive")
    assert zenodo.ranges == [(source.file, 0)]


def test_what_is_cut_off_goes_on_where_it_was(zenodo, tmp_path):
    source, part = SMALL["spanish"], tmp_path / "FETAL_PLANES_ZENODO.zip.part"
    zenodo.cut = 200
    with refused(DatasetError, r"cut off after 200 bytes.*run this again.*/3904280 in"):
        fetch(source, tmp_path, zenodo.api)
    assert part.stat().st_size == 200 and names(tmp_path) == [part.name]
    zenodo.cut = None
    (tmp_path / ".FETAL_PLANES_ZENODO.part").mkdir()  # of a run that was killed
    (tmp_path / ".FETAL_PLANES_ZENODO.part" / "half.png").touch()
    assert names(fetch(source, tmp_path, zenodo.api)) == [
        ".unpacked",
        "FETAL_PLANES_DB_data.csv",
        "Images",
    ]
    assert zenodo.ranges == [(source.file, 0), (source.file, 200)]
    assert names(tmp_path) == sorted([source.folder, source.file])


@pytest.mark.parametrize("fault", ["sum", "part", "absent", "page", "no server"])
def test_a_failed_download_is_one_line_that_says_what_to_do_and_leaves_nothing(
    zenodo, tmp_path, fault
):
    source, api = SMALL["spanish"], zenodo.api
    if fault == "sum":
        zenodo.sum = "0" * 32
    elif fault == "part":
        (tmp_path / f"{source.file}.part").write_bytes(b"x" * len(zenodo.files[source.file]))
    elif fault == "absent":
        del zenodo.files[source.file]
    elif fault == "page":
        zenodo.listing = lambda: "<html>Too many requests</html>"
    else:
        api = "http://127.0.0.1:9/api/records"
    with refused(DatasetError, place=f"{source.file} cannot be fetched (") as error:
        fetch(source, tmp_path, api)
    assert str(error.value).endswith(
        f"/3904280 in a browser and unpack it as {tmp_path / source.folder}"
    )
    assert names(tmp_path) == []


def test_what_is_damaged_or_incomplete_is_refused_and_never_appears(zenodo, tmp_path):
    file = tmp_path / SMALL["african"].file
    file.write_bytes(b"<html>")
    with refused(DatasetError, r"tar\.xz cannot be unpacked .*delete it and run this"):
        fetch(SMALL["african"], tmp_path, zenodo.api)
    file.unlink()
    more = replace(SMALL["african"], images=19)
    with refused(DatasetError, r"cannot be unpacked \(18 of 19 images are there\)"):
        fetch(more, tmp_path, zenodo.api)
    assert names(tmp_path) == [file.name]
    folder = fetch(SMALL["african"], tmp_path, zenodo.api)
    (folder / ".unpacked").unlink()
    with refused(DatasetError, r"Zenodo_dataset: 18 of 19 images are there; move it"):
        fetch(more, tmp_path, zenodo.api)
    assert len(list(folder.rglob("*.png"))) == 18  # the user's: not touched


def test_the_authors_images_are_fetched_with_a_list_from_the_record_or_beside_the_other_lists(
    zenodo, tmp_path, monkeypatch
):
    monkeypatch.setitem(SOURCES, "synthetic", replace(SOURCES["synthetic"], images=5))
    body = io.BytesIO()
    with zipfile.ZipFile(body, "w") as archive:
        for n, plane in enumerate(PLANES):
            archive.writestr(f"images/{plane}/{n:05}-{77 + n}.png", b"a picture")
    zenodo.files = {"images.zip": body.getvalue()}
    rows = [f"{n:05}-{77 + n},{'fetal ' * (n < 4)}{plane}" for n, plane in enumerate(PLANES)]
    text = "\n".join(["\ufeffImage_name,Plane", *rows])

    with refused(DatasetError, f"has no {LIST} that says"):
        fetch_synthetic(tmp_path / "z", None, zenodo.api)
    (tmp_path / LIST).write_text(text, encoding="utf-8")
    beside = read_synthetic(fetch_synthetic(tmp_path / "z", tmp_path, zenodo.api))
    zenodo.files[LIST] = text.encode()
    inside = read_synthetic(fetch_synthetic(tmp_path / "y", None, zenodo.api))
    require_images(beside + inside)
    assert [record.plane for record in beside] == [record.plane for record in inside] == [*PLANES]


@pytest.mark.filterwarnings("ignore:.*found in sys.modules")
def test_a_folder_that_cannot_be_made_is_one_line_and_exit_code_2(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").touch()
    monkeypatch.setattr(sys, "argv", ["download", "--to", str(tmp_path / "file" / "x")])
    with pytest.raises(SystemExit) as end:
        runpy.run_module("planes.download", run_name="__main__")
    said = capsys.readouterr().err
    assert end.value.code == 2 and said.startswith("download: ") and said.count("\n") == 1


@real_data
def test_the_real_african_set_is_complete():
    assert fetch(SOURCES["african"], DATA) == DATA / "Zenodo_dataset"
