"""Fetching the datasets, from a server on the loopback address that has small archives in the real
layouts."""

import hashlib
import os
import runpy
import shutil
import sys
import tarfile
import threading
import zipfile
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from planes.datasets import DatasetError, read_african, read_spanish, require_images
from planes.download import ARCHIVES, fetch, main, parse_args

ROOT = Path(__file__).resolve().parents[2]
SHARED = ROOT.parent / "shared" / "data"


class Server:
    """Files by name, and the names that were asked for."""

    def __init__(self):
        self.files, self.asked, server = {}, [], self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                name = self.path[1:]
                server.asked.append(name)
                body, claimed = server.files.get(name, (None, 0))
                self.send_response(404 if body is None else 200)
                self.send_header("Content-Length", str(claimed))
                self.end_headers()
                self.wfile.write(body or b"")

            def log_message(self, *_):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True).start()

    def serve(self, name, body, claimed=None):
        self.files[name] = body, len(body) if claimed is None else claimed


@pytest.fixture
def server(monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    server = Server()
    yield server
    server.http.shutdown()
    server.http.server_close()


def spanish_zip(folder, top=""):
    """Two images and the real table's header, in a .zip without a top folder, as the real one."""
    file = folder / "FETAL_PLANES_ZENODO.zip"
    with zipfile.ZipFile(file, "w") as archive:
        header = "Image_name;Patient_num;Plane;Brain_plane;Operator;US_Machine;Train \n"
        rows = "".join(f"image{n};{n};Fetal femur;Not A Brain;Op. 1;Aloka;{n} \n" for n in range(2))
        archive.writestr(f"{top}FETAL_PLANES_DB_data.csv", header + rows)
        for n in range(2):
            archive.writestr(f"{top}Images/image{n}.png", os.urandom(2000))
    return file.read_bytes()


def african_tar(folder, images=3):
    """Three images of Malawi in a .tar.xz with a top folder, as the real one."""
    top = folder / "Zenodo_dataset"
    (top / "Malawi").mkdir(parents=True)
    rows = "".join(f"{n},Fetal brain,0,Malawi,patient{n}\n" for n in range(3))
    (top / "African_planes_database.csv").write_text(
        "Patient_num,Plane,Train,Center,Filename\n" + rows
    )
    for n in range(images):
        (top / "Malawi" / f"patient{n}.png").write_bytes(os.urandom(2000))
    with tarfile.open(folder / "Zenodo_dataset.tar.xz", "w:xz") as archive:
        archive.add(top, top.name)
    return (folder / "Zenodo_dataset.tar.xz").read_bytes()


@pytest.fixture
def archives(server, tmp_path_factory):
    """The real declarations, but for the address, the checksum and the number of images."""
    made = tmp_path_factory.mktemp("made")
    spanish, african = ARCHIVES["spanish"], ARCHIVES["african"]
    body = spanish_zip(made)
    server.serve(spanish.name, body)
    server.serve(african.name, african_tar(made))
    return {
        "spanish": replace(
            spanish,
            url=f"{server.url}/{spanish.name}",
            md5=hashlib.md5(body).hexdigest(),
            records=2,
        ),
        "african": replace(african, url=f"{server.url}/{african.name}", records=3),
    }


def names(folder):
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


def gets(server):
    return len(server.asked)


def test_both_datasets_are_fetched_to_where_their_readers_find_them(archives, tmp_path, capsys):
    to = tmp_path / "new" / "data"
    main(parse_args(["--to", str(to)]), archives)
    assert names(to) == [
        "FETAL_PLANES_ZENODO",
        "FETAL_PLANES_ZENODO.zip",
        "Zenodo_dataset",
        "Zenodo_dataset.tar.xz",
    ]
    for read, count in ((read_spanish, 2), (read_african, 3)):
        records = read(to)
        require_images(records)
        assert len(records) == count
    assert (
        capsys.readouterr().out.splitlines()[1]
        == f"african: 3 images of the five planes in {to / 'Zenodo_dataset'}"
    )


def test_only_one_is_fetched_if_only_one_is_asked_for(archives, tmp_path):
    main(parse_args(["--to", str(tmp_path), "--only", "african"]), archives)
    assert names(tmp_path) == ["Zenodo_dataset", "Zenodo_dataset.tar.xz"]


@pytest.mark.parametrize("name", ["spanish", "african"])
def test_what_is_there_is_not_fetched_again(name, server, archives, tmp_path):
    folder = fetch(archives[name], tmp_path)
    before = gets(server)
    marker = folder / "note.txt"
    marker.touch()
    assert fetch(archives[name], tmp_path) == folder and marker.exists()  # unpacked: left alone
    shutil.rmtree(folder)
    assert fetch(archives[name], tmp_path).is_dir()  # the archive: unpacked again
    assert gets(server) == before


@pytest.mark.parametrize("name", ["spanish", "african"])
@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "page"])
def test_a_broken_archive_is_fetched_again(name, damage, server, archives, tmp_path):
    body = bytearray(server.files[archives[name].name][0])
    if damage == "flipped":
        body[len(body) // 2] ^= 1
    body = {
        "cut": body[:-100],
        "flipped": body,
        "empty": b"",
        "page": b"<html>Too many requests</html>",
    }[damage]
    (tmp_path / archives[name].name).write_bytes(body)
    assert len(archives[name].read(fetch(archives[name], tmp_path))) == archives[name].records
    assert gets(server) > 0


@pytest.mark.parametrize("name", ["spanish", "african"])
def test_a_part_left_by_a_killed_run_is_not_taken_for_the_archive(name, archives, tmp_path):
    archive = archives[name]
    (tmp_path / f"{archive.name}.part").write_bytes(b"half")
    scratch = tmp_path / f".{archive.folder}.part"
    scratch.mkdir()
    (scratch / "half.png").touch()
    assert "half.png" not in names(fetch(archive, tmp_path))
    assert names(tmp_path) == sorted([archive.folder, archive.name])


@pytest.mark.parametrize("name", ["spanish", "african"])
@pytest.mark.parametrize("fault", ["cut", "page", "absent", "no server"])
def test_a_failed_download_says_what_to_fetch_by_hand_and_leaves_nothing(
    name, fault, server, archives, tmp_path
):
    archive = archives[name]
    body = server.files[archive.name][0]
    if fault == "cut":
        server.serve(archive.name, body[: len(body) // 2], claimed=len(body))
    elif fault == "page":
        server.serve(archive.name, b"<html>Too many requests</html>")
    elif fault == "absent":
        server.files.clear()
    else:
        server.http.shutdown()
        server.http.server_close()
    with pytest.raises(DatasetError) as error:
        fetch(archive, tmp_path)
    message = str(error.value)
    assert "\n" not in message and message.startswith(f"{archive.url} cannot be fetched (")
    assert (
        f"download it in a browser ({archive.size}), save it as {tmp_path / archive.name} and"
        in message
    )
    assert names(tmp_path) == []


def test_an_archive_saved_by_hand_is_unpacked_without_a_network(server, archives, tmp_path):
    archive = archives["spanish"]
    (tmp_path / archive.name).write_bytes(server.files[archive.name][0])
    server.http.shutdown()
    server.http.server_close()
    assert len(read_spanish(fetch(archive, tmp_path))) == 2


def test_an_archive_with_a_top_folder_or_without_is_unpacked_alike(archives, tmp_path):
    made = tmp_path / "made"
    made.mkdir()
    body = spanish_zip(made, top="FETAL_PLANES_ZENODO/")
    archive = replace(archives["spanish"], md5=hashlib.md5(body).hexdigest())
    assert names(fetch(archive, made)) == ["FETAL_PLANES_DB_data.csv", "Images"]
    assert names(fetch(archives["spanish"], tmp_path)) == ["FETAL_PLANES_DB_data.csv", "Images"]


def test_an_archive_that_lacks_images_is_refused_and_nothing_unpacked_is_left(
    server, archives, tmp_path
):
    made, to = tmp_path / "made", tmp_path / "to"
    server.serve(archives["african"].name, african_tar(made, images=2))
    with pytest.raises(
        DatasetError, match=r"cannot be unpacked \(1 of 3 images are missing \(patient2\)"
    ):
        fetch(archives["african"], to)
    assert names(to) == ["Zenodo_dataset.tar.xz"]
    with pytest.raises(DatasetError, match="lists 3 images of the five planes, not 4"):
        fetch(replace(archives["african"], records=4), to)


def test_an_incomplete_folder_is_neither_used_nor_touched(server, archives, tmp_path):
    folder = fetch(archives["african"], tmp_path)
    (folder / "Malawi" / "patient1.png").unlink()
    before = gets(server)
    with pytest.raises(
        DatasetError, match="Zenodo_dataset is there but incomplete: 1 of 3 images are missing"
    ):
        fetch(archives["african"], tmp_path)
    assert names(folder / "Malawi") == ["patient0.png", "patient2.png"] and gets(server) == before


def test_a_folder_that_cannot_be_made_is_one_line_and_exit_code_2(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").touch()
    monkeypatch.setattr(
        sys, "argv", ["download", "--to", str(tmp_path / "file"), "--only", "african"]
    )
    with (
        pytest.warns(RuntimeWarning, match="found in sys.modules"),
        pytest.raises(SystemExit) as end,
    ):
        runpy.run_module("planes.download", run_name="__main__")
    out, err = capsys.readouterr()
    assert end.value.code == 2 and out == ""
    assert (
        err.startswith(f"planes.download: {tmp_path / 'file'} cannot be made a folder (")
        and err.count("\n") == 1
    )


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the real data in ../shared/data")
def test_the_real_datasets_have_the_declared_numbers_of_records():
    assert fetch(ARCHIVES["african"], SHARED) == SHARED / "Zenodo_dataset"
    assert len(read_spanish(SHARED)) == ARCHIVES["spanish"].records
