"""What makes the paper of the stages: its rows, its numbers, its report.

| concept | where |
|---|---|
| the rows of tables 1 and 2, the controls they lack, the ranks of figure 3, as data | `plan.py` |
| the real images: datasets, own sites, phantoms; how large a run is | `material.py`, `scales.py` |
| what the rows need and take, and what is missing here | `preview.py` |
| running scripts one after the other | `stages.py` |
| finished rows; figures 2 and 3 and all that is said of the synthetic images | `results.py`, `synthetic.py` |
| the paper's own numbers, and where its code parts from it | `published.py` |
| where the gain comes from: balance, synthetic images, style words, plain controls | `gain.py` |
| the report: its first screen and sections, what it folds away | `report.py`, `details.py` |
| its tables; Markdown and HTML | `tables.py`, `document.py` |
| a run's classifiers at one more site | `elsewhere.py` |
"""
