"""How good the classifiers are, how the images look, and what a run was.

| concept | where |
|---|---|
| the rows of tables 1 and 2, the ranks of figure 3, as data; what they need | `plan.py`; `preview.py` |
| running scripts one after the other | `stages.py` |
| accuracy, recall, precision, F-score, AUC; confusion matrix; intervals by patient | `metrics.py` |
| two data models on the same images: McNemar, paired bootstrap; over patients and seeds | `compare.py`; `levels.py` |
| FID, KID, precision, recall, density, coverage; copies of training images | `quality.py` |
| image features: Inception v3 or a classifier of our own | `features.py` |
| t-SNE of features | `tsne.py` |
| contact sheets, confusion matrices, t-SNE panels, loss curves; values with intervals | `figures.py`; `forest.py` |
| finished rows; figures 2 and 3 and all that is said of the synthetic images | `results.py`, `synthetic.py` |
| the paper's own numbers, and where its code parts from it | `published.py` |
| where the gain comes from: balance, synthetic images, style words, plain controls | `gain.py` |
| the report: its first screen and sections, what it folds away | `report.py`, `details.py` |
| its tables; Markdown and HTML | `tables.py`, `document.py` |
| arguments, versions, machine and input hashes beside a run's outputs | `record.py` |

Python has a builtin `eval`: always `from eval.metrics import score`, never `import eval`.
"""
