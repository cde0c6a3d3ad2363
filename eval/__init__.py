"""How good the classifiers are, and the synthetic images. It measures, and does nothing else.

| concept | where |
|---|---|
| accuracy, recall, precision, F-score, AUC; confusion matrix; intervals by patient | `metrics.py` |
| two data models on the same images: bootstrap over patients and seeds | `compare.py` |
| FID, KID, precision, recall, density, coverage; copies of training images | `quality.py` |
| image sheets, confusion matrices, t-SNE, losses; differences with intervals | `figures.py` |

Python has a builtin `eval`: always `from eval.metrics import evaluate`, never `import eval`.
"""
