"""Two small checkpoints in the layouts of SD 1.5 and SD 2.1, and what the original modules compute.

    python tests/references/make_checkpoints.py ../shared/reference/checkpoints

makes checkpoint_sd1.safetensors and checkpoint_sd2.safetensors: inputs "in.*" and outputs "gold.*"
of CompVis's modules in float64 (the text tower's of plain torch), cut out of the reference
collection; in the header the keys and shapes of both layouts, as published models have them. The
weights are not stored: `build` draws each from a stream of its own.
"""

import argparse
import hashlib
import json
import math
import runpy
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

HERE = Path(__file__).parent
NORMS = ("in_layers.0.", "out_layers.0.", ".norm", ".out.0.", "layer_norm", ".ln_", "ln_final")
RESIDUAL = (".out_layers.3.", ".proj_out.", ".to_out.0.", ".ff.net.2.", ".conv2.")
RESIDUAL += (".out_proj.", ".fc2.", ".c_proj.")
QUERY_KEY = (".to_q.", ".to_k.", ".q_proj.", ".k_proj.", ".attn_1.q.", ".attn_1.k.")


def weight(key: str, shape: list[int], seed: int) -> torch.Tensor:
    """The tensor of a CompVis key, rounded to float16: scaled by its kind, so that activations stay
    of order one; no layer is zero."""
    if key.endswith("position_ids"):
        return torch.arange(77)[None]
    stream = int.from_bytes(hashlib.sha256(f"{seed}|{key}".encode()).digest()[:16], "little")
    w = np.random.Generator(np.random.PCG64(stream)).standard_normal(shape, dtype=np.float32)
    kind = key.rpartition(".")[2]
    if any(name in key for name in NORMS):
        w = 1 + 0.2 * w if kind == "weight" else 0.2 * w
    elif "embedding" in key:
        w = (0.5 if "token" in key else 0.2) * w
    elif kind in ("bias", "in_proj_bias"):
        w = 0.1 * w
    else:
        residual, asks = (any(name in key for name in names) for names in (RESIDUAL, QUERY_KEY))
        gain = 0.5 if residual else 1.4 if asks else 1.0
        w = gain / math.sqrt(math.prod(shape[1:] or shape)) * w
        if kind == "in_proj_weight":
            w[: 2 * shape[0] // 3] *= 1.4
    return torch.from_numpy(np.ascontiguousarray(w)).half()


def build(case: str, out: Path) -> Path:
    """Write single_file.safetensors and diffusers/ of "sd1" or "sd2" into a folder of its name; its
    tokenizer is CLIP's own and not here."""
    with safe_open(HERE / f"checkpoint_{case}.safetensors", "pt") as file:
        layout = {name: json.loads(text) for name, text in file.metadata().items()}
    place = Path(out) / case
    single = {key: weight(key, *rest) for key, rest in layout["single_file"].items()}
    (place / "diffusers").mkdir(parents=True)
    save_file(single, place / "single_file.safetensors")
    for name, values in layout["json"].items():
        path = place / "diffusers" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(values))
    for name, rows in layout["diffusers"].items():
        tensors = {}
        for key, (shape, source, *third) in rows.items():
            value = torch.arange(77) if source is None else single[source]
            value = value.chunk(3)[third[0]] if third else value
            tensors[key] = value.reshape(shape).clone()
        save_file(tensors, place / "diffusers" / name)
    return place


def cut(reference: Path, case: str) -> None:
    """What the tests read of one reference model."""
    tensors = load_file(reference / f"tiny_{case}" / "refs.safetensors")
    kept = {k: v for k, v in tensors.items() if k.startswith(("in.unet", "gold.unet", "in.vae.b"))}
    for name in ("moments", "std", "latent", "decoded"):
        kept[f"gold.vae.b.{name}"] = tensors[f"gold.vae.b.{name}"]
    for name in ("in.text.ids", *(f"gold.text.clip_skip{n}" for n in (1, 2, 3))):
        kept[name] = tensors[name][1:4].clone()  # with padding, with a 0 inside, full
    config, layout = (
        json.loads((reference / f"tiny_{case}" / f"{name}.json").read_text())
        for name in ("config", "layout")
    )
    beside = runpy.run_path(str(reference / "make.py"))["bookkeeping"]()
    shapes = layout["single_file"] + [[key, list(value.shape)] for key, value in beside.items()]
    parts = config["diffusers"] | {"vae": config["diffusers"]["vae"].copy()}
    del parts["vae"]["scaling_factor"]  # as in the published ones
    names = {"scheduler": "scheduler/scheduler_config.json"}
    files = {names.get(name, f"{name}/config.json"): values for name, values in parts.items()}
    header = {
        "single_file": {key: [shape, config["seed"]] for key, shape in shapes},
        "diffusers": {
            name: {key: rest for key, *rest in rows} for name, rows in layout["diffusers"].items()
        },
        "json": files | layout["shard_indices"],
        "versions": {"modules": "CompVis ldm, Stability-AI ldm", "torch": "2.15"},
    }
    header = {name: json.dumps(value, separators=(",", ":")) for name, value in header.items()}
    save_file(kept, HERE / f"checkpoint_{case}.safetensors", header)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("reference", type=Path, help="folder of make.py, tiny_sd1 and tiny_sd2")
    folder = parser.parse_args().reference
    for case in ("sd1", "sd2"):
        cut(folder, case)
