"""How good the classifiers are, how the images look, and what a run was.

| concept | where |
|---|---|
| accuracy, recall, precision, F-score, AUC; confusion matrix; intervals by patient (tables 1 and 2) | `metrics.py` |
| image features: Inception v3 or a classifier of our own | `features.py` |
| t-SNE of features | `tsne.py` |
| contact sheets, confusion matrices, t-SNE panels, loss curves (figures 2 and 3) | `figures.py` |
| tables in Markdown | `report.py` |
| arguments, versions and input hashes beside a run's outputs | `record.py` |

Python has a builtin `eval`: always `from eval.metrics import score`, never `import eval`.
"""
