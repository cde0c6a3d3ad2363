"""What makes the paper of the stages: its rows, its numbers, its report.

| concept | where |
|---|---|
| the rows of tables 1 and 2, the controls they lack; how large each stage is | `plan.py` |
| the real images of the rows: datasets, own sites, phantoms | `material.py` |
| what the rows need, and what is missing here | `preview.py` |
| running scripts one after the other, and nothing twice | `stages.py` |
| finished rows, read back; their scores over patients and seeds | `results.py` |
| the synthetic images: figures 2 and 3, quality, copies | `synthetic.py` |
| the paper's own numbers | `published.py`, `published.csv` |
| where the gain comes from: balance, synthetic images, style words, plain controls | `gain.py` |
| the report, its tables, Markdown and HTML | `report.py`, `tables.py`, `document.py` |
| a run's classifiers at one more site | `elsewhere.py` |
"""
