"""Low-rank adaptation of any nn.Module, after Hu et al. 2021 (arXiv 2106.09685).

A layer's frozen weight W0 (out x in) is corrected by a product of two thin matrices, the only ones
that are trained (Eq. 2 of FU-LoRA, arXiv 2407.20072; the factor alpha / r is Hu et al.'s, section
4.1):

    h = W0 x + strength * (alpha / r) * B A x        A: (r, in) random, B: (out, r) zero before
    training

| concept | where |
|---|---|
| Eq. 2 for one linear layer or 1x1 convolution, at run time or merged into W0 | `layer.py` LoRALayer |
| which layers of a model get one | `model.py` TARGETS, inject |
| a whole model: strength, merge and unmerge, removal, the parameters to train | `model.py` |
| around a training: presets, what a step sees, the optimizer, checkpoints | `training.py` |
| when any long run saves, where it is asked to stop too, and what may go on from it | `saving.py` |
| files of kohya, PEFT and diffusers: into models, from models, from one layout to another | `files/` |
"""

from lora.files import LoRASummary, convert, load_lora, save_lora
from lora.layer import LoRAError, LoRALayer
from lora.model import (
    TARGETS,
    inject,
    lora_layers,
    lora_names,
    lora_parameters,
    merge,
    remove,
    set_strength,
    unmerge,
)

__all__ = [
    "TARGETS",
    "LoRAError",
    "LoRALayer",
    "LoRASummary",
    "convert",
    "inject",
    "load_lora",
    "lora_layers",
    "lora_names",
    "lora_parameters",
    "merge",
    "remove",
    "save_lora",
    "set_strength",
    "unmerge",
]
