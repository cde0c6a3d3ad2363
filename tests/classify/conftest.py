"""classify.py in this process, on two small sites and a tiny network."""

import runpy

import pytest
from shorthand import ROOT
from small import tiny, write_site

from classify.models import MODELS

SMALL = "--model tiny --weights none --size 64 --epochs 2 --batch-size 8 --workers 0 --device cpu"


@pytest.fixture(scope="module")
def sites(tmp_path_factory):
    """A source of 16 training images, a target of 4 of them and 8 of test."""
    root = tmp_path_factory.mktemp("sites")
    write_site(root / "source", 0, 16, 0)
    write_site(root / "target", 1, 4, 8)
    return root


@pytest.fixture(autouse=True)
def _tiny(monkeypatch):
    monkeypatch.setitem(MODELS, "tiny", tiny)


@pytest.fixture
def classify(sites):
    """run(out, *flags) runs classify.py on the sites, whose globals are run.globals."""
    script = runpy.run_path(str(ROOT / "classify.py"), run_name="classify_script")

    def run(out, *flags, places=("--source", sites / "source", "--target", sites / "target")):
        line = [*places, *SMALL.split(), "--out", out, *flags]
        return script["main"](script["parse_args"]([*map(str, line)]))

    run.globals = script["parse_args"].__globals__
    return run
