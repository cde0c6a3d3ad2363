"""What users of AUTOMATIC1111's webui and of ComfyUI know: how they write prompts, and what a PNG
says.

| concept | where |
|---|---|
| prompts with weights in brackets, of any length | `prompts.py` |
| one image's settings, and its PNG | `shots.py` |
| the table of a folder's images | `manifest.py` |
"""
