"""What tests of several rooms share: where things lie, and what a refusal is."""

import csv
import json
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
REFERENCES = ROOT / "tests" / "references"
DATA = ROOT.parent / "shared" / "data"
real_data = pytest.mark.skipif(not DATA.is_dir(), reason="needs the real data in ../shared/data")


@contextmanager
def refused(error, words=None, place=""):
    """What is done here raises this error, in one line that begins with its place."""
    with pytest.raises(error, match=words) as caught:
        yield caught
    line = str(caught.value)
    assert "\n" not in line and line.startswith(str(place))


@contextmanager
def exits(capsys, words):
    """What is done here ends the process with code 2 and these words."""
    with pytest.raises(SystemExit) as stop:
        yield
    assert stop.value.code == 2 and words in capsys.readouterr().err


def noise(*shape, seed=0, dtype=torch.float64):
    return torch.randn(
        shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    ).to(dtype)


def agree(actual, expected, atol, rtol=0):
    torch.testing.assert_close(actual, expected, atol=atol, rtol=rtol)


def read_json(path):
    return json.loads(path.read_text(encoding="utf-8"))


def table(path):
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def write_site(root, counts, bright):
    """Images of noise, as bright as their site is lit."""
    rng = np.random.default_rng(bright)
    for name, count in counts.items():
        (root / name).mkdir(parents=True)
        for n in range(count):
            noise = rng.integers(0, bright, (24, 24), dtype=np.uint8)
            Image.fromarray(noise).save(root / name / f"{n}.png")
    return root


class Answers(BaseHTTPRequestHandler):
    """The requests of a server that says nothing of them."""

    def answer(self, status, headers, body, cut=None):
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[:cut])

    def log_message(self, *_):
        pass


@contextmanager
def served(handler):
    """The address of a server in this process."""

    class Server(ThreadingHTTPServer):
        # eight files come at once, and a connection that is turned away waits a second
        request_queue_size = 64

    server = Server(("127.0.0.1", 0), handler)
    Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
