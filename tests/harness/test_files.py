"""Files that are written whole or not at all, their hashes, states that a run goes on from, and
flags."""

import argparse
import hashlib
import json
import math
import os

import pytest
import torch
from shorthand import exits, read_json, refused

from harness import processes
from harness.files import (
    file_below,
    folder_hash,
    json_text,
    left_out,
    sha256,
    sha256_of_all,
    walk,
    whole_file,
    whole_files,
    write_table,
)
from harness.flags import LAST_SEED, device_name, plain_text, require_at_least, seed_number
from harness.record import record_environment
from harness.resume import rate_share, read_state, write_state


class Mistake(Exception):
    pass


def digest(text):
    return hashlib.sha256(text.encode()).hexdigest()


def test_a_file_appears_when_it_is_whole_and_the_one_before_stays_where_it_is_not(tmp_path):
    path = tmp_path / "new" / "a"
    with whole_file(path) as part:
        part.write_text("first")
        assert not path.exists()
    with refused(Mistake), whole_file(path) as part:
        part.write_text("half")
        raise Mistake
    assert path.read_text() == "first" and [*path.parent.iterdir()] == [path]


def test_files_appear_when_all_of_them_are_whole(tmp_path):
    (tmp_path / ".part").mkdir()
    (tmp_path / ".part" / "of a killed run").touch()
    with whole_files(tmp_path) as part:
        (part / "a").touch()
        assert [path.name for path in tmp_path.iterdir()] == [".part"]
    with refused(Mistake), whole_files(tmp_path) as part:
        (part / "b").touch()
        raise Mistake
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_hashes_are_of_contents_in_order_and_of_a_folders_names(tmp_path):
    (tmp_path / "x").mkdir()
    a, b, *uncounted = (tmp_path / name for name in ("a", "x/b", "x/.c", "x/R.md", "s.py", "s.pyc"))
    for path in (a, b, *uncounted):
        path.write_text(path.name)
    assert sha256(a) == folder_hash(a) == digest("a")
    assert sha256_of_all([b, a]) == digest(digest("b") + digest("a"))
    assert folder_hash(tmp_path) == digest(f"a {digest('a')}\nx/b {digest('b')}\n")


def test_pictures_are_found_by_their_endings_without_hidden_ones_and_a_runs_own(tmp_path):
    root, other = tmp_path / "root", tmp_path / "other"
    files = "b.PNG a.tif ._a.png notes.txt q.GIF deep/c.webp deep/r.dcm deep/s.tga .trash/o.png"
    for name in (*files.split(), "run/args.json", "run/sheet.png", "run/x/d.png", "../other/e.jpg"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    (root / "link").symlink_to(other)
    (other / "back").symlink_to(root)
    images, others = walk(root)
    assert [path.relative_to(root).as_posix() for path in images] == [
        *("a.tif", "b.PNG", "deep/c.webp", "deep/r.dcm", "link/e.jpg", "run/x/d.png")
    ]
    assert left_out(root, others).endswith("root: not read, by type: s.tga, q.GIF (2)")
    assert walk(root, below=False) == (images[:2], others[1:]) and not left_out(root, [])
    with pytest.raises(FileNotFoundError):
        walk(root / "none")
    for name in ("IM0001", "volume.nii.gz"):
        (other / name).touch()
    assert left_out(other, walk(other, below=False).others).endswith("IM0001, volume.nii.gz (2)")
    os.close(os.open(os.fsencode(other) + b"/caf\xe9.png", os.O_CREAT))
    with refused(OSError, r"png: a name that is not in UTF-8; rename it \(1 such\)", other):
        walk(other)


def test_a_file_is_found_by_the_name_that_a_list_of_another_system_gives_it(tmp_path):
    folder = tmp_path / "fe\u0301mur"
    folder.mkdir()
    (folder / "a.png").touch()
    for name in ("fe\u0301mur\\a.png", "f\u00e9mur/a.png", "f\u00e9mur\\a.png"):
        assert file_below(tmp_path, name) == folder / "a.png"
    assert file_below(tmp_path, "a\\b.png") == tmp_path / "a\\b.png"


def test_what_is_no_number_is_null_in_json_and_a_table_has_its_rows(tmp_path):
    value = {"a": [1.5, math.nan, (math.inf, "x")]}
    assert json_text(value).endswith("}\n")
    assert json.loads(json_text(value)) == {"a": [1.5, None, [None, "x"]]}
    write_table(tmp_path / "t.csv", [{"a": 1, "b": "x, y"}, {"a": 2, "b": ""}])
    assert (tmp_path / "t.csv").read_bytes() == b'a,b\n1,"x, y"\n2,\n'


def test_the_environment_names_arguments_versions_inputs_and_machine(tmp_path):
    args = argparse.Namespace(out=tmp_path, rank=4)
    record_environment(tmp_path, args, {"data": "abc"})
    said = read_json(tmp_path / "environment.json")
    assert said["arguments"] == {"out": str(tmp_path), "rank": 4}
    assert said["inputs"] == {"data": "abc"} and "code" in said
    assert torch.__version__.startswith(said["versions"]["torch"])
    assert said["machine"]["cpus"] >= 1


def test_a_state_is_read_by_the_run_that_wrote_it_and_by_no_other(tmp_path, monkeypatch):
    path, tensor = tmp_path / "checkpoint.pt", torch.arange(3.0)
    write_state(path, {"identity": {"rank": "4", "a.png": "x"}, "tensor": tensor})
    first = path.read_bytes()

    def read(identity, restore=lambda state: state):
        return read_state(path, identity, "train.py", Mistake, restore)

    monkeypatch.setattr("os.getpid", lambda: 1)
    write_state(path, read({"rank": "4", "a.png": "x"}))
    assert path.read_bytes() == first  # whether made or read, by whatever process
    with refused(Mistake, r"other settings \(--rank was 4, is 8; a\.png was x, is None\)"):
        read({"rank": "8"})
    with refused(Mistake, r"no checkpoint of train\.py"):
        read({"rank": "4", "a.png": "x"}, lambda state: state["lost"])
    path.write_bytes(first[:-40])
    with refused(Mistake, "or a damaged one: remove it to begin anew"):
        read({"rank": "4", "a.png": "x"})


def test_a_cosine_goes_from_all_of_the_rate_to_none():
    assert [rate_share("constant", step, 4) for step in (0, 4)] == [1, 1]
    shares = [rate_share("cosine", step, 4) for step in range(5)]
    assert shares == pytest.approx([1, 0.5 + 0.125**0.5, 0.5, 0.5 - 0.125**0.5, 0])


def test_one_process_is_number_0_of_1_and_has_all_of_the_work():
    assert (processes.rank(), processes.size(), processes.is_first()) == (0, 1, True)
    assert processes.share([1, 2, 3]) == [1, 2, 3] and processes.broadcast(True)
    assert processes.all_reduce([], 1.5, 2) == (1.5, 2)


def test_flags_that_mean_nothing_are_refused():
    assert device_name("cpu") == "cpu" and plain_text("é,\r\nb") == "é, b"
    assert seed_number(str(LAST_SEED)) == 2**32 - 1
    for kind, text in ((device_name, "meta"), (device_name, "gpu"), (plain_text, "\udce9")):
        with refused(argparse.ArgumentTypeError):
            kind(text)
    for text in ("-1", "1.5", str(2**32)):
        with refused(argparse.ArgumentTypeError, "choose a whole number from 0 to"):
            seed_number(text)


def test_a_number_below_the_least_is_an_error_and_one_that_was_not_given_is_none(capsys):
    parser, args = argparse.ArgumentParser(), argparse.Namespace(a=1, b_c=math.nan, d=None)
    require_at_least(parser, args, 1, "a", "d")
    for least, name, said in ((2, "a", "--a 1: at least 2"), (0, "b_c", "--b-c nan: at least 0")):
        with exits(capsys, said):
            require_at_least(parser, args, least, name)
