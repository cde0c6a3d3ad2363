"""The embedded miniature Stable Diffusion, a diffusers folder (`ldm.MINI`), and how it was trained;
see README.md here.

| concept | where |
|---|---|
| procedural scenes and captions that it learned from | `scenes.py` |
| autoencoder, U-Net and text encoder, all in order | `pretrain.py` |
"""
