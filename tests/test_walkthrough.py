"""docs/walkthrough.md holds to the code: what it names exists, what it quotes stands there, what it
shows is drawn."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "docs" / "walkthrough.md").read_text(encoding="utf-8")
PATH, NAME = r"`([\w/]+\.py)`", r"`([\w.]+)`"
FILES = sorted(set(re.findall(PATH, TEXT)))
NAMED = re.findall(rf"{NAME}(?:,[^.`]*)? in\s+{PATH}", TEXT)
NAMED += [(name, path) for path, name in re.findall(rf"{PATH},\s+{NAME}", TEXT)]
QUOTES = [
    (re.findall(PATH, TEXT[: match.start()])[-1], match[1])
    for match in re.finditer(r"```python\n(.*?)```", TEXT, re.DOTALL)
]


def defined(path: Path) -> set[str]:
    """Functions, classes, methods as Class.method, and names assigned at the top of a file."""
    names = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
            inner = list(ast.walk(node)) if isinstance(node, ast.FunctionDef) else node.body
            names |= {
                f"{node.name}.{item.name}" for item in inner if isinstance(item, ast.FunctionDef)
            }
            names |= {item.name for item in inner if isinstance(item, ast.FunctionDef)}
        for target in getattr(node, "targets", [getattr(node, "target", None)]):
            if isinstance(target, ast.Name):
                names.add(target.id)
    return names


@pytest.mark.parametrize("path", FILES)
def test_a_file_that_is_named_exists(path):
    assert (ROOT / path).is_file()


@pytest.mark.parametrize(("name", "path"), NAMED)
def test_a_name_is_defined_in_the_file_that_the_text_says(name, path):
    assert name in defined(ROOT / path)


def test_every_other_name_is_defined_or_an_attribute_in_a_file_that_the_text_names():
    known = set().union(*(defined(ROOT / path) for path in FILES))
    attributes = {
        a
        for path in FILES
        for a in re.findall(r"self\.(\w+)", (ROOT / path).read_text(encoding="utf-8"))
    }
    names = {name for name in re.findall(NAME, TEXT) if not name.endswith(".py")}
    assert {
        name for name in names if name not in known and name.removesuffix(".0") not in attributes
    } == set()


@pytest.mark.parametrize(("path", "quote"), QUOTES)
def test_a_quoted_line_stands_in_the_file_named_last(path, quote):
    assert quote in (ROOT / path).read_text(encoding="utf-8")


def test_every_picture_is_there_and_drawn_by_the_script_and_none_is_left_over():
    shown = re.findall(r"!\[[^\]]+\]\(walkthrough/(\w+\.png)\)", TEXT)
    script = (ROOT / "docs" / "pictures.py").read_text(encoding="utf-8")
    there = {path.name for path in (ROOT / "docs" / "walkthrough").glob("*.png")}
    assert set(shown) == there == set(re.findall(r'"(\w+\.png)":', script))
    assert len(shown) >= 5
    assert max((ROOT / "docs" / "walkthrough" / name).stat().st_size for name in shown) < 150_000


def test_the_reading_list_counts_lines_rightly_and_is_read_in_an_hour():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    listed = {path: int(lines) for path, lines in re.findall(rf"{PATH} \((\d+)\)", text)}
    assert {
        path: (ROOT / path).read_text(encoding="utf-8").count("\n") for path in listed
    } == listed
    assert f"in {len(listed)} files of {sum(listed.values()):,} lines" in text
    assert max(listed.values()) <= 250 and sum(listed.values()) <= 2800


def test_the_text_names_and_quotes_enough_for_these_tests_to_mean_something():
    assert len(FILES) > 15 and len(NAMED) > 15 and len(QUOTES) > 10
