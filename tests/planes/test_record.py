"""A record of Zenodo, from a server on the loopback address that speaks as Zenodo does: cut off,
resumed, verified."""

import hashlib
import io
import json
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from PIL import Image

from planes import PLANES
from planes.datasets import DatasetError, read_synthetic, require_images
from planes.record import LIST, SYNTHETIC, fetch_record, fetch_synthetic


class Zenodo:
    """Files by name, of which a listing tells; `cut`: bytes after which the connection ends;
    `ranges`: those asked."""

    def __init__(self):
        self.files, self.sums, self.cut, self.ranges, zenodo = {}, {}, None, [], self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                name = self.path.rpartition("/")[2]
                if name == str(SYNTHETIC):
                    return self.answer(200, zenodo.listing())
                if name not in zenodo.files:
                    return self.answer(404, b"")
                body, asked = zenodo.files[name], self.headers.get("Range")
                zenodo.ranges.append((name, asked))
                begin = int(asked.removeprefix("bytes=").rstrip("-")) if asked else 0
                if begin >= len(body):
                    return self.answer(416, b"")
                self.answer(206 if asked else 200, body[begin:], zenodo.cut)

            def answer(self, code, body, cut=None):
                self.send_response(code)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body[:cut])

            def log_message(self, *_):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.api = f"http://127.0.0.1:{self.http.server_port}/api/records"
        threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True).start()

    def listing(self):
        files = []
        for name, body in self.files.items():
            md5 = self.sums.get(name, hashlib.md5(body).hexdigest())
            files.append(
                {
                    "key": name,
                    "checksum": f"md5:{md5}",
                    "links": {"self": f"{self.api}/files/{name}"},
                }
            )
        return json.dumps({"files": files}).encode()


@pytest.fixture
def zenodo(monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    zenodo = Zenodo()
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        for n, plane in enumerate(PLANES):
            picture = io.BytesIO()
            Image.new("L", (40, 40), 50 * n).save(picture, "PNG")
            file.writestr(f"images/{plane}/{n:05}-{77 + n}.png", picture.getvalue())
    zenodo.files["images.zip"] = archive.getvalue()
    rows = "".join(f"{n:05}-{77 + n},Fetal {plane}\n" for n, plane in enumerate(PLANES))
    zenodo.list = "\ufeffImage_name,Plane\n" + rows.replace("Fetal other", "Other")
    yield zenodo
    zenodo.http.shutdown()
    zenodo.http.server_close()


def test_the_authors_images_are_fetched_unpacked_and_read(zenodo, tmp_path):
    zenodo.files[LIST] = zenodo.list.encode()
    manifest = fetch_synthetic(tmp_path / "z", None, zenodo.api)
    records = read_synthetic(manifest)
    require_images(records)
    assert [record.plane for record in records] == [*PLANES]
    asked = len(zenodo.ranges)
    # not again
    assert (
        fetch_synthetic(tmp_path / "z", None, zenodo.api) == manifest
        and len(zenodo.ranges) == asked
    )


def test_the_list_may_lie_beside_the_authors_other_lists(zenodo, tmp_path):
    with pytest.raises(DatasetError, match=f"has no {LIST}"):
        fetch_synthetic(tmp_path / "z", None, zenodo.api)
    (tmp_path / "lists").mkdir()
    (tmp_path / "lists" / LIST).write_text(zenodo.list, encoding="utf-8")
    require_images(read_synthetic(fetch_synthetic(tmp_path / "z", tmp_path / "lists", zenodo.api)))


def test_what_is_cut_off_goes_on_where_it_was(zenodo, tmp_path):
    body = zenodo.files["images.zip"]
    zenodo.cut = 200
    with pytest.raises(DatasetError, match="cut off after 200 bytes") as error:
        fetch_record(SYNTHETIC, tmp_path, zenodo.api)
    assert "\n" not in str(error.value) and (tmp_path / "images.zip.part").stat().st_size == 200
    zenodo.cut = None
    assert fetch_record(SYNTHETIC, tmp_path, zenodo.api) == [tmp_path / "images.zip"]
    assert zenodo.ranges == [("images.zip", None), ("images.zip", "bytes=200-")]
    assert (tmp_path / "images.zip").read_bytes() == body and not (
        tmp_path / "images.zip.part"
    ).exists()


def test_a_part_that_is_whole_is_taken_and_one_that_is_damaged_is_not(zenodo, tmp_path):
    (tmp_path / "images.zip.part").write_bytes(zenodo.files["images.zip"])
    fetch_record(SYNTHETIC, tmp_path, zenodo.api)
    (tmp_path / "images.zip").unlink()
    (tmp_path / "images.zip.part").write_bytes(b"x" * 100)
    with pytest.raises(DatasetError, match="what came is damaged, and was removed"):
        fetch_record(SYNTHETIC, tmp_path, zenodo.api)
    assert not list(tmp_path.glob("images.zip*"))
    fetch_record(SYNTHETIC, tmp_path, zenodo.api)


def test_a_file_with_another_checksum_is_refused(zenodo, tmp_path):
    zenodo.sums["images.zip"] = "0" * 32
    with pytest.raises(DatasetError, match="what came is damaged"):
        fetch_record(SYNTHETIC, tmp_path, zenodo.api)
    assert not list(tmp_path.glob("images*"))


def test_a_record_that_is_not_there_or_not_zenodos_is_one_line(zenodo, tmp_path):
    with pytest.raises(DatasetError, match="does not say what is in the record"):
        fetch_record(5, tmp_path, zenodo.api)
    zenodo.listing = lambda: (
        b'{"files": [{"key": "../x.zip", "checksum": "md5:00", "links": {"self": "http://x"}}]}'
    )
    with pytest.raises(DatasetError, match="is no file with an md5; fetch it by hand"):
        fetch_record(SYNTHETIC, tmp_path, zenodo.api)
    zenodo.listing = lambda: b"<html>"
    with pytest.raises(DatasetError, match="does not say what is in the record"):
        fetch_record(SYNTHETIC, tmp_path, zenodo.api)
