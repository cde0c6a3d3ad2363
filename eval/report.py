"""The report of a reproduction: Markdown with tables, figures beside it, and what was run."""

from collections.abc import Mapping, Sequence

METRICS = {"accuracy": "ACC", "recall": "Recall", "precision": "Precision", "f_score": "F-score", "auc": "AUC"}


def percent(value: float, interval: Sequence[float] | None = None) -> str:
    """A fraction as percent, with its 95 % interval where there is one."""
    if interval is None:
        return f"{100 * value:.2f}"
    return f"{100 * value:.2f} ({100 * interval[0]:.1f} to {100 * interval[1]:.1f})"


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table; the first column is text, the others are numbers."""
    lines = [header, ["---", *["--:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def zero_shot_table(results: Mapping[str, Mapping], definition: str = "notebook") -> str:
    """The paper's table 1: a row for each data model, percentages with 95 % intervals by patient bootstrap.

    results: data model -> what classify.py writes into metrics.json
    """
    rows = []
    for name, result in results.items():
        scores, intervals = result["scores"][definition], result["intervals"][definition]
        counts = [result["training"]["sources"].get(source, 0) for source in ("spain", "synthetic")]
        rows.append([name, *counts, *(percent(scores[m], intervals[m]) for m in METRICS)])
    return table(["Data", "# real", "# synthetic", *METRICS.values()], rows)


def lora_table(recognised: Mapping[str, Mapping[str, float]]) -> str:
    """How many synthetic images a classifier of real ones takes for the plane of their prompt, by sampler.

    recognised: row, such as "ES, with LoRA" -> sampler -> fraction
    """
    samplers = list(next(iter(recognised.values())))
    rows = [[name, *(percent(shares[sampler]) for sampler in samplers)] for name, shares in recognised.items()]
    return table(["", *samplers], rows)
