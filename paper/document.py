"""A small document (headings, paragraphs, tables, pictures, folded parts), as Markdown and as one
HTML file."""

import base64
import html
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Heading:
    text: str
    level: int = 2


@dataclass(frozen=True)
class Paragraph:
    text: str


@dataclass(frozen=True)
class Code:
    """A line to be typed."""

    text: str


@dataclass(frozen=True)
class Table:
    """Cells as text. The first `labels` columns are words, the others numbers, set to the right;
    lines break only in a table of words alone.

    ValueError for a row that is not as long as the header.
    """

    header: Sequence[str]
    rows: Sequence[Sequence[object]]
    labels: int = 1

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != len(self.header):
                raise ValueError(
                    f"{len(row)} cells under {len(self.header)} headings:"
                    f" {', '.join(map(str, row))}"
                )


@dataclass(frozen=True)
class Picture:
    """A PNG file and what it shows."""

    path: Path
    caption: str


@dataclass(frozen=True)
class Beside:
    """Pictures next to each other where the page is wide enough."""

    pictures: Sequence[Picture]


@dataclass(frozen=True)
class Details:
    """A part that HTML folds away under one line; in Markdown a heading of level 3."""

    summary: str
    blocks: Sequence["Block"]


Block = Heading | Paragraph | Code | Table | Picture | Beside | Details

STYLE = """
body { margin: 1rem auto; max-width: 76rem; padding: 0 1rem; font: 16px/1.5 system-ui, sans-serif; color: #1a1a1a; }
h1, h2, h3 { line-height: 1.2; margin-top: 1.6em; }
h1 { margin: 0; }
h1 + p { max-width: none; font-size: 1.15rem; font-weight: 600; }
p, figcaption { max-width: 46rem; }
.beside { display: flex; flex-wrap: wrap; gap: 1rem; align-items: flex-start; }
.beside figure { flex: 1 1 26rem; margin: 0.5rem 0; }
details { border-top: 1px solid #ddd; padding: 0.4rem 0; }
summary { cursor: pointer; font-weight: 600; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: 0.875rem; font-variant-numeric: tabular-nums; }
th, td { padding: 0.2rem 0.5rem; text-align: right; border-bottom: 1px solid #ddd; white-space: nowrap; }
th { border-bottom: 2px solid #888; vertical-align: bottom; }
.label { text-align: left; }
.words td { white-space: normal; }
pre { padding: 0.5rem; background: #f4f4f4; overflow-x: auto; }
figure { margin: 1.5rem 0; }
img { max-width: 100%; }
figcaption { font-size: 0.875rem; color: #444; }
"""


def to_markdown(blocks: Sequence[Block], folder: Path) -> str:
    """The document as Markdown; pictures are linked relative to `folder`, in which they lie."""
    return "\n\n".join(_markdown(block, folder) for block in blocks) + "\n"


def to_html(blocks: Sequence[Block]) -> str:
    """The document as one HTML page that needs no other file: pictures are inlined. Its first block
    is its title."""
    body = "\n".join(_html(block) for block in blocks)
    title = html.escape(blocks[0].text)
    head = (
        '<meta charset="utf-8">\n<meta name="viewport"'
        f' content="width=device-width">\n<title>{title}</title>'
    )
    return f'<!doctype html>\n<html lang="en">\n{head}\n<style>{STYLE}</style>\n{body}\n</html>\n'


def _markdown(block: Block, folder: Path) -> str:
    match block:
        case Heading(text, level):
            return f"{'#' * level} {text}"
        case Paragraph(text):
            return text
        case Code(text):
            return f"```\n{text}\n```"
        case Picture(path, caption):
            return f"![{caption}]({path.resolve().relative_to(folder.resolve()).as_posix().replace(' ', '%20')})"
        case Beside(pictures):
            return "\n\n".join(_markdown(picture, folder) for picture in pictures)
        case Details(summary, blocks):
            return "\n\n".join(_markdown(inner, folder) for inner in (Heading(summary, 3), *blocks))
        case Table(header, rows, labels):
            rule = ["---"] * labels + ["--:"] * (len(header) - labels)
            lines = [
                [str(cell).replace("|", "\\|") for cell in line] for line in (header, rule, *rows)
            ]
            return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _html(block: Block) -> str:
    match block:
        case Heading(text, level):
            return f"<h{level}>{html.escape(text)}</h{level}>"
        case Paragraph(text):
            return f"<p>{html.escape(text)}</p>"
        case Code(text):
            return f"<pre>{html.escape(text)}</pre>"
        case Picture(path, caption):
            data = base64.b64encode(path.read_bytes()).decode("ascii")
            caption = html.escape(caption)
            image = f'<img src="data:image/png;base64,{data}" alt="{caption}">'
            return f"<figure>{image}<figcaption>{caption}</figcaption></figure>"
        case Beside(pictures):
            return f'<div class="beside">{"".join(map(_html, pictures))}</div>'
        case Details(summary, blocks):
            inside = "\n".join(map(_html, blocks))
            return f"<details><summary>{html.escape(summary)}</summary>\n{inside}\n</details>"
        case Table(header, rows, labels):
            lines = "\n".join(
                [_cells("th", header, labels), *(_cells("td", row, labels) for row in rows)]
            )
            kind = ' class="words"' if labels == len(header) else ""
            return f'<div class="wide"><table{kind}>\n{lines}\n</table></div>'


def _cells(tag: str, cells: Sequence[object], labels: int) -> str:
    kinds = [' class="label"' if n < labels else "" for n in range(len(cells))]
    inside = "".join(
        f"<{tag}{kind}>{html.escape(str(cell))}</{tag}>" for kind, cell in zip(kinds, cells)
    )
    return f"<tr>{inside}</tr>"
