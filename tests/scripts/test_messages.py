"""What scripts say: no message names what only a Python programmer gives."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ROOMS = ("planes", "ldm", "lora", "samplers", "classify", "eval", "paper")
FILES = [
    *ROOT.glob("*.py"),
    *(path for room in ROOMS for path in sorted((ROOT / room).rglob("*.py"))),
]
KEYS_OF_FILES = {
    "prediction_type",  # of scheduler_config.json
    "file_name",  # of metadata.jsonl
    "repeats_caption",  # the form of a folder's name
    "sigma_min",  # a word that the schedule takes
}


def text_of(node):
    """The fixed words of a message."""
    return "".join(
        n.value for n in ast.walk(node) if isinstance(n, ast.Constant) and isinstance(n.value, str)
    )


def messages(tree):
    """(line, words) of everything that is raised, warned of, printed, or refused by argparse."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Raise) and node.exc is not None:
            yield node.lineno, text_of(node.exc)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in {
            "print", "parser.error", "warnings.warn", "sys.stderr.write", "logging.getLogger(__name__).warning",
        }:  # fmt: skip
            yield node.lineno, text_of(node)


def arguments(trees):
    """The names of all functions' and classes' arguments that have an underline, as no flag has."""
    for tree in trees:
        for node in ast.walk(tree):
            if isinstance(node, ast.arg) and "_" in node.arg.strip("_"):
                yield node.arg
            elif isinstance(node, ast.ClassDef):
                yield from (
                    n.target.id
                    for n in node.body
                    if isinstance(n, ast.AnnAssign)
                    and isinstance(n.target, ast.Name)
                    and "_" in n.target.id.strip("_")
                )


def test_no_message_names_a_python_argument():
    trees = {path: ast.parse(path.read_text(encoding="utf-8")) for path in FILES}
    names, found, count = {*arguments(trees.values())} - KEYS_OF_FILES, [], 0
    for path, tree in trees.items():
        for line, words in messages(tree):
            count += 1
            bad = {word for word in re.findall(r"\b[a-z]+_[a-z_]+\b", words) if word in names}
            bad |= {*re.findall(r"`[a-z_]+`", words)}  # a name as Python's docstrings quote them
            if bad:
                found.append(f"{path.relative_to(ROOT)}, line {line}: {', '.join(sorted(bad))}")
    assert found == []
    # what it looks for is there
    assert count > 200 and {"guidance_scale", "negative_context", "steps_offset"} < names
