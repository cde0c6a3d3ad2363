"""Low-rank adaptation of any nn.Module, after Hu et al. 2021 (arXiv 2106.09685).

A layer's frozen weight W0 (out x in) is corrected by a product of two thin matrices, the only ones
that are trained (Eq. 2 of FU-LoRA, arXiv 2407.20072, where alpha = r; the factor alpha / r is of Hu
et al., section 4.1):

    h = W0 x + (alpha / r) * B A x        A: (r, in) random, B: (out, r) zero before training

| concept | where |
|---|---|
| Eq. 2 for one linear layer or convolution | `layer.py` LoRALayer |
| which layers of a model get one, what is trained; updates put into the weights | `model.py` |
| which images a step sees, the noise of a step, the optimizer | `training.py` |
| files of kohya, PEFT and diffusers: into weights, from models, converted | `files/` |
"""

from lora.files import convert, load_loras, save_lora
from lora.layer import LoRAError, LoRALayer
from lora.model import TARGETS, inject, lora_layers, lora_parameters
