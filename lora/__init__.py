"""Low-rank adaptation of any nn.Module, after Hu et al. 2021 (arXiv 2106.09685).

A layer's frozen weight W0 (out x in) is corrected by a product of two thin matrices, the only ones that are trained
(Eq. 2 of FU-LoRA, arXiv 2407.20072; the factor alpha / r is Hu et al.'s, section 4.1):

    h = W0 x + strength * (alpha / r) * B A x        A: (r, in) random, B: (out, r) zero before training

| concept | where |
|---|---|
| Eq. 2 for one linear layer or 1x1 convolution, at run time or merged into W0 | `layer.py` LoRALayer |
| which layers of a model get one | `layer.py` TARGETS, inject |
| a whole model: strength, merge and unmerge, removal, the parameters to train | `layer.py` |
| a LoRA file into models, all or nothing, or beside others; models' LoRAs into a file; converting | `files.py` |
| a base model with LoRAs in its weights, as a file or folder: a command, to be run and not imported | `merge.py` |
| around a training: presets, the batches of a step, the optimizer, checkpoints, metadata | `training.py` |
| reading the layouts of kohya, PEFT and diffusers, without a model; writing the first two | `formats.py`, `export.py` |
"""

from lora.layer import (
    TARGETS,
    LoRAError,
    LoRALayer,
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


def __getattr__(name: str):
    # not imported above, where `python -m lora.files` would find its own module imported before it runs
    if name in ("LoRASummary", "convert", "load_lora", "save_lora"):
        from lora import files

        return getattr(files, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
