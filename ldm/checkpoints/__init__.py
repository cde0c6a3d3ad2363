"""Stable Diffusion's weights in and out.

| concept | where |
|---|---|
| a model from a single file or a diffusers folder, and back | `checkpoint.py` |
| the folder's files and configs | `folder.py` |
| single files: which family, whose text tower, which prediction | `single_file.py` |
| tables of tensor names | `keys.py` |
| tensors of a file, safetensors or a safe pickle, and what is none | `weights.py` |
| CLIP's tokenizer | `tokenizer.py` |
| models by their hub id | `hub.py` |
"""

from ldm.checkpoints.checkpoint import (
    NETWORKS,
    PREDICTION_TYPES,
    Config,
    Model,
    load,
    save_folder,
    save_single,
)
