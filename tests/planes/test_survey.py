"""What there is at two sites, what is odd there, and what a later stage would refuse."""

import numpy as np
import pytest
from PIL import Image
from shorthand import refused

from planes.datasets import DatasetError
from planes.sites import read_site
from planes.survey import main, parse_args, survey


def fill(root, *names, shade=0):
    """Images, each of its own grey."""
    for n, name in enumerate(names, start=shade):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((8, 9 + n % 2), n, "uint8")).save(root / name)
    return root


@pytest.fixture
def sites(tmp_path):
    """Of three images a class; the second has a patient of the first, and copies of it."""
    fill(tmp_path / "a", *(f"{c}/p{n}/{n}.png" for c in ("bar", "disc") for n in range(3)))
    fill(tmp_path / "b", "bar/p2/x.png", "bar/q/y.png", shade=50)
    (tmp_path / "b" / "disc").mkdir()
    for name in ("disc/z.png", "bar/q/zz.png"):
        (tmp_path / "b" / name).write_bytes((tmp_path / "a/bar/p0/0.png").read_bytes())
    (tmp_path / "b" / "bar" / "q.gif").touch()

    def look(**needs):
        sources = {"a": ("source", True), "b": ("target", False)}
        roots = [tmp_path / name for name in sources if (tmp_path / name).exists()]
        return survey([(root, read_site(root, *sources[root.name])) for root in roots], **needs)

    return look


def test_a_survey_counts_classes_and_tells_what_is_odd_once(sites, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("planes.survey._told", set())  # by other tests of this process
    said, root = [], str(tmp_path)
    found = sites(template="a {class}", per_class=20, fewer=True, say=said.append)
    rows = [line.split() for line in found.splitlines()]
    assert f"{root}/a: 6 images of 8 bits, 9x8 to 10x8 px\n" in found
    assert (rows[2], rows[8]) == (["bar", "3", "3", "0", "3"], ["disc", "1", "0", "1", "1"])
    assert [line.replace(root, "") for line in said] == [
        "a LoRA takes as many images of each class as the rarest has: 3, not 20",
        "/a: fewer than 8 images of bar (3), disc (3): scores will say little",
        "/a: folders below a class are taken for patients: p0, p1, p2",
        "/b: fewer than 8 images of bar (3), disc (1): scores will say little",
        "/b: folders below a class are taken for patients: p2, q",
        "/b: not read, by type: q.gif (1)",
        "copies of the other site's (1): /b/bar/q/zz.png is /a/bar/p0/0.png",
        "copies of images with another label (1): /b/disc/z.png is /a/bar/p0/0.png",
        "patients of the same name at both sites: p2 (1); if they are the same people, leave them"
        " out of one",
    ]
    lines = [f"- {line}" for line in said]
    assert found.splitlines()[-9:] == lines
    assert sites(say=said.append).splitlines()[-8:] == lines[1:] and len(said) == 9

    main(parse_args([*(f"{root}/{name}" for name in "ab"), "--out", f"{root}/out"]))
    assert capsys.readouterr().out.startswith(sites())
    assert Image.open(tmp_path / "out" / "sites.png").size == (1568, 240)
    (tmp_path / "b" / "images.csv").write_text("image,class\nbar/p2/x.png,bar\ndisc/z.png,disc")
    assert "b: not in images.csv: y.png, zz.png (2)" in sites()
    rows = ["image,class,patient", "bar/p2/x.png,bar,anonymous", "disc/z.png,disc,anonymous"]
    (tmp_path / "b" / "images.csv").write_text("\n".join(rows))
    assert "b: all images are of one patient, so scores get no intervals" in sites()


@pytest.mark.parametrize(
    "change, words",
    {
        "": "0.png: not a readable image .*; replace or remove it .unreadable in .*a: 2 of 6",
        "b/rivet/0.png": "a: nobody can learn rivet, as no images are there to train on",
        "a/images.csv": "a: nobody can learn bar, as no images are there to train on",
        "template": "'no place': give one that says once where the class goes",
        "per_class": "images of bar: 3, 4 of each are asked for",
    }.items(),
)
def test_what_a_later_stage_would_refuse_is_refused_at_once(sites, tmp_path, change, words):
    needs = {"template": "no place", "per_class": 4}
    needs = {change: needs[change]} if change in needs else {}
    if change.endswith("csv"):
        rows = "image,class,split", "bar/p0/0.png,bar,test", "disc/p0/3.png,disc,train"
        (tmp_path / change).write_text("\n".join(rows))
    elif change.endswith("png"):
        fill(tmp_path, change)
    elif not change:
        for n in range(2):
            (tmp_path / "a" / "bar" / f"p{n}" / f"{n}.png").write_bytes(b"broken")
    with refused(DatasetError, words):
        sites(**needs)
