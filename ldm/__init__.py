"""Stable Diffusion by hand: the networks, their checkpoints, and text to image.

| concept | where |
|---|---|
| timestep embedding, residual block, attention, resampling | `layers.py` |
| the denoising U-Net eps(x_t, t, context) | `unet.py` |
| the autoencoder between images and latents | `vae.py` |
| prompts to context: CLIP's tokenizer and text tower, clip_skip | `text.py` |
| prompts as webui's users write them: weights in brackets, any length | `prompts.py` |
| a model from a single file or a diffusers folder, and back | `checkpoint.py` |
| the folder's files and configs | `folder.py` |
| tables of tensor names | `keys.py` |
| single files: which family, whose text tower, which prediction | `single_file.py` |
| tensors of a file, safetensors or a safe pickle, and what is none | `weights.py` |
| models by their hub id; the scripts' flags for a base model | `hub.py`, `cli.py` |
| noise and text to latents, with a sampler; variations of an image | `generate.py` |
| one image's settings, in its PNG and back; the webui's text there | `shots.py`, `infotext.py` |
| Textual Inversion: one learned token and its file | `embedding.py` |
| image files in, images out | `images.py` |
| images of any shape in buckets by aspect ratio | `buckets.py` |
| the embedded miniature, and how it was trained | `mini/`, `scenes.py`, `bpe.py`, `pretrain_mini.py` |
"""

from pathlib import Path

MINI = Path(__file__).parent / "mini"
"""The embedded miniature model, a diffusers folder; what the scripts take where no other is named."""
