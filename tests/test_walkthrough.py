"""What docs say holds: docs/walkthrough.md names and quotes code that is there and shows pictures
that are drawn; the commands of README.md and docs/ have flags that scripts know."""

import re
import runpy
import shlex
from pathlib import Path

import pytest
from shorthand import ROOT

import ldm.cli

TEXT = (ROOT / "docs" / "walkthrough.md").read_text(encoding="utf-8")
PATH, NAME = r"`([\w/]+\.py)`", r"`([\w.]+)`"
CODE = {path: (ROOT / path).read_text(encoding="utf-8") for path in re.findall(PATH, TEXT)}
NAMED = re.findall(rf"{NAME}(?:,[^.`]*)? in\s+{PATH}", TEXT)
NAMED += [(name, path) for path, name in re.findall(rf"{PATH},\s+{NAME}", TEXT)]
QUOTES = [
    (re.findall(PATH, TEXT[: match.start()])[-1], match[1])
    for match in re.finditer(r"```python\n(.*?)```", TEXT, re.DOTALL)
]


def defines(code, name):
    """Has it a function, class or variable of this name, or an attribute (`to_out.0`)?"""
    names = name.removesuffix(".0").split(".")
    return all(
        re.search(rf"^ *(def|class) {n}\b|^{n}\b.* = |self\.{n} = |^    {n}: ", code, re.MULTILINE)
        for n in names
    )


def test_a_name_is_defined_in_the_file_that_the_text_says_or_in_one_that_it_names():
    assert len(NAMED) > 15 and [pair for pair in NAMED if not defines(CODE[pair[1]], pair[0])] == []
    others = {name for name in re.findall(NAME, TEXT) if not name.endswith(".py")}
    code = "\n".join(CODE.values())
    assert [name for name in others if not defines(code, name)] == []


def test_a_quoted_line_stands_in_the_file_named_last():
    assert len(QUOTES) > 10
    assert [quote for path, quote in QUOTES if quote not in CODE[path]] == []


def test_every_picture_is_there_and_drawn_by_the_script_and_none_is_left_over():
    shown = set(re.findall(r"!\[[^\]]+\]\(walkthrough/(\w+\.png)\)", TEXT))
    script = (ROOT / "docs" / "pictures.py").read_text(encoding="utf-8")
    there = {path.name for path in (ROOT / "docs" / "walkthrough").glob("*.png")}
    assert len(shown) >= 5 and shown == there == {
        f"{name}.png" for name in re.findall(r"def (\w+)\(\) -> Figure", script)
    }


def commands():
    """(page, script or module, its words) of each line in a block of shell."""
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        blocks = re.findall(r"```sh\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
        for line in "\n".join(blocks).replace("\\\n", " ").splitlines():
            line = line.replace(" .. ", " --spanish x --african y ")  # a placeholder
            words = shlex.split(line, comments=True)
            modules = [n for n, word in enumerate(words) if word == "-m" and n + 1 < len(words)]
            scripts = [n for n, word in enumerate(words) if re.fullmatch(r"\w+\.py", word)]
            for n in [n + 1 for n in modules] or scripts:
                if words[n] not in ("venv", "pytest", "pip"):
                    yield pytest.param(words[n], words[n + 1 :], id=f"{page.name}: {line[:60]}")


@pytest.mark.parametrize("name, words", list(commands()))
def test_a_command_of_the_docs_has_flags_that_its_script_knows(name, words, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(ldm.cli, "resolve_model", lambda source, part="model": Path(source))
    run = runpy.run_path if name.endswith(".py") else runpy.run_module
    space = run(name.replace("planes.sites", "planes.survey"), run_name="docs")  # where it stands
    assert space["parse_args"](words)
