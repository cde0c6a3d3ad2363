"""Stable Diffusion by hand: the networks, and text to image.

| concept | where |
|---|---|
| timestep embedding, residual block, attention, resampling | `layers.py` |
| the denoising U-Net eps(x_t, t, context) | `unet.py` |
| the autoencoder between images and latents | `vae.py` |
| prompts to context: CLIP's tokenizer and text tower, clip_skip | `text.py` |
| noise and text to latents, with a sampler | `generate.py` |
| image files in, images out | `images.py` |
| images of any shape in buckets by aspect ratio | `buckets.py` |
| Textual Inversion: one learned token and its file | `embedding.py` |
| the scripts' flags for a base model | `cli.py` |
| weights in and out: single files, diffusers folders, the hub | `checkpoints/` |
| as the webui's users know it: prompts in brackets, what a PNG says | `webui/` |
| the embedded miniature, and how it was trained | `mini/` |
"""

from pathlib import Path

MINI = Path(__file__).parent / "mini"
"""The embedded miniature model, a diffusers folder; what the scripts take where no other is
named."""


class CheckpointError(ValueError):
    """A checkpoint that cannot be read or written; one line: what is wrong, where, what to do."""
