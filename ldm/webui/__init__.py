"""What users of AUTOMATIC1111's webui and of ComfyUI know: how they write prompts, and what a PNG
says of its making.

| concept | where |
|---|---|
| prompts with weights in brackets, of any length | `prompts.py` |
| one image's settings, in its PNG and back | `shots.py` |
| the webui's text there | `infotext.py` |
| the table of a folder's images | `manifest.py` |
| what images of a run share, the flags that make one again | `like.py` |
"""

from ldm.webui.like import common_fields, settings_of
from ldm.webui.manifest import manifest_text, other_rows
from ldm.webui.prompts import encode_weighted
from ldm.webui.shots import (
    Saving,
    Shot,
    is_saved,
    lora_hash,
    lora_hashes,
    lora_labels,
    model_hash,
    read_shot,
    require_same,
    same_pixels,
    save_shot,
    tags,
)

__all__ = [
    "Saving",
    "Shot",
    "common_fields",
    "encode_weighted",
    "is_saved",
    "lora_hash",
    "lora_hashes",
    "lora_labels",
    "manifest_text",
    "model_hash",
    "other_rows",
    "read_shot",
    "require_same",
    "same_pixels",
    "save_shot",
    "settings_of",
    "tags",
]
