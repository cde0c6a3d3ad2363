"""A report as blocks of Markdown, and those as one HTML page that needs no other file.

A block is a heading, a paragraph, a table, a picture or a command. What stands under a heading of
level 3 is folded away in HTML.
"""

import base64
import html
import re
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from eval.figures import save

FIGURES = "figures"
"""Where a report's pictures lie, beside it."""

STYLE = """
body { margin: 1rem auto; max-width: 76rem; padding: 0 1rem; color: #1a1a1a; }
body { font: 16px/1.5 system-ui, sans-serif; }
h1, h2, h3 { line-height: 1.2; margin-top: 1.6em; }
h1 { margin: 0; }
h1 + p + p { max-width: none; font-size: 1.15rem; font-weight: 600; }
p, figcaption { max-width: 46rem; }
details { border-top: 1px solid #ddd; padding: 0.4rem 0; }
summary { cursor: pointer; font-weight: 600; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: 0.875rem; font-variant-numeric: tabular-nums; }
th, td { padding: 0.2rem 0.5rem; text-align: right; }
th, td { border-bottom: 1px solid #ddd; }
th { border-bottom: 2px solid #888; vertical-align: bottom; }
.label { text-align: left; }
pre { background: #f4f4f4; padding: 0.5rem; white-space: pre-wrap; overflow-wrap: anywhere; }
figure { display: inline-block; max-width: 48%; margin: 0.5rem 0; vertical-align: top; }
details figure, .wide + figure { max-width: none; }
img { max-width: 100%; }
figcaption { font-size: 0.875rem; color: #444; }
"""


def table(header: Sequence[str], rows: Sequence[Sequence[object]], labels: int = 2) -> str:
    """The first `labels` columns are words, the others numbers, set to the right."""
    rule = ["---"] * labels + ["--:"] * (len(header) - labels)
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in (header, rule, *rows))


def picture(name: str, caption: str) -> str:
    """A PNG file of FIGURES, and what it shows."""
    return f"![{caption}]({FIGURES}/{name})"


def plural(count: int, what: str) -> str:
    """So many of it."""
    return f"{count:,} {what}{'s' * (count != 1)}"


def command(line: str) -> str:
    """What is typed into a shell."""
    return f"```sh\n{line}\n```"


def draw(folder: Path, name: str, figure: Figure, caption: str) -> str:
    """Save a figure into FIGURES of the folder; `picture` of it."""
    (folder / FIGURES).mkdir(parents=True, exist_ok=True)
    legend = save(figure, folder / FIGURES / name)
    return picture(name, f"{caption} {legend}".strip())


def to_html(blocks: Sequence[str], folder: Path) -> str:
    """The page; the first block is its title. folder: in which FIGURES is."""
    body, folded = [], False
    for block in blocks:
        hashes, _, title = html.escape(block).partition(" ")
        if hashes in ("#", "##", "###"):
            body += ["</details>"] * folded
            folded, tag = hashes == "###", f"h{len(hashes)}"
            opened = f"<details><summary>{title}</summary>"
            body.append(opened if folded else f"<{tag}>{title}</{tag}>")
        elif hashes == "|":
            body.append(_html_table(block))
        elif found := re.fullmatch(r"!\[(.*)\]\((.*)\)", block):
            data = base64.b64encode((folder / found[2]).read_bytes()).decode()
            caption = html.escape(found[1])
            image = f'<img src="data:image/png;base64,{data}" alt="{caption}">'
            body.append(f"<figure>{image}<figcaption>{caption}</figcaption></figure>")
        elif hashes.startswith("```"):
            body.append(f"<pre>{html.escape(block[6:-4])}</pre>")
        else:
            body.append(f"<p>{html.escape(block)}</p>")
    inside = "\n".join([*body, *["</details>"] * folded])
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>{html.escape(blocks[0].strip("# "))}</title>
<style>{STYLE}</style>
</head>
<body>
{inside}
</body>
</html>
"""


def _html_table(block: str) -> str:
    header, rule, *rows = (line[2:-2].split(" | ") for line in block.splitlines())
    lines = []
    for tag, row in (("th", header), *(("td", row) for row in rows)):
        kinds = (' class="label"' * (mark == "---") for mark in rule)
        # an interval on one line, if it can be, and a long name on several
        row = (html.escape(cell).replace(" to ", "&nbsp;to&nbsp;") for cell in row)
        row = (cell.replace("_", "_<wbr>") for cell in row)
        cells = (f"<{tag}{kind}>{cell}</{tag}>" for kind, cell in zip(kinds, row))
        lines.append(f"<tr>{''.join(cells)}</tr>")
    return '<div class="wide"><table>\n' + "\n".join(lines) + "\n</table></div>"
