"""How good the classifiers are, how the images look, and what a run was.

| concept | where |
|---|---|
| accuracy, recall, precision, F-score, AUC; confusion matrix; intervals by patient | `metrics.py` |
| what classify.py says of the test images; a trained classifier on any folder, and as ONNX | `outcome.py`; `use.py` |
| what a frozen vision model does by itself: linear probe, neighbours, prompts | `probe.py` |
| two data models on the same images: McNemar, paired bootstrap; over patients and seeds | `compare.py`; `levels.py` |
| FID, KID, precision, recall, density, coverage; copies of training images | `quality.py` |
| image features: Inception v3 or a classifier of our own; t-SNE of them | `features.py`; `tsne.py` |
| contact sheets, confusion matrices, t-SNE panels, loss curves; values with intervals | `figures.py`; `forest.py` |
| flags that every script has; what each is wrapped in; torchrun's processes | `flags.py`; `script.py`; `ranks.py` |
| arguments, versions, machine and input hashes beside a run's outputs | `record.py` |

Python has a builtin `eval`: always `from eval.metrics import score`, never `import eval`.
"""
