"""LoRAs put into a base model for good, for the programs that want one file or folder.

    python merge_lora.py v1-5-pruned.safetensors fetal.safetensors --strength 0.8 --out fetal-v1-5.safetensors

W0 + strength * (alpha / r) * B A (the paper's eq. 2), summed in float32 and cast once.
"""

import argparse
import json
from pathlib import Path

from harness.script import run
from ldm import CheckpointError
from ldm.checkpoints import save_folder, save_single
from ldm.checkpoints.weights import open_weights
from ldm.cli import DTYPES, add_model_arguments, load_model, lora_path
from ldm.webui import lora_hash, model_hash
from lora.files import load_lora
from lora.files.metadata import ARCHITECTURES
from lora.layer import LoRAError
from lora.model import lora_layers, merge


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Merges LoRA files into a base model.")
    parser.usage = "%(prog)s MODEL LORA [LORA ..] --out OUT [flags]"
    add = parser.add_argument
    add_model_arguments(parser, positional=True)
    add(
        "loras",
        metavar="LORA",
        type=lora_path,
        nargs="+",
        help="LoRAs of kohya, PEFT or diffusers: files or hub ids",
    )
    add("--out", type=Path, required=True, help="the file or folder to write, which must not exist")
    add(
        "--strength",
        type=float,
        nargs="+",
        default=[1.0],
        help="one of all LoRAs, or one of each (1)",
    )
    add(
        "--to",
        choices=["single", "folder"],
        help="webui's file or diffusers' folder (default: by the name of --out)",
    )
    add("--dtype", choices=DTYPES, help="of the weights that are written (default: the base's own)")
    args = parser.parse_args(argv)
    args.to = args.to or ("single" if args.out.suffix == ".safetensors" else "folder")
    if args.to == "single" and args.out.suffix != ".safetensors":
        parser.error(f"--out {args.out}: give a single file a name in .safetensors")
    if args.to == "folder" and args.out.suffix in (".safetensors", ".ckpt", ".pt", ".pth", ".bin"):
        parser.error(
            f"--out {args.out}: give a single file a name in .safetensors, a folder one without"
            " such an end"
        )
    if len(args.strength) not in (1, len(args.loras)):
        parser.error(
            f"--strength: {len(args.strength)} numbers for {len(args.loras)} LoRAs; give one, or"
            " one of each"
        )
    if len({path.resolve() for path in args.loras}) < len(args.loras):
        parser.error("LORA: one file twice; give it once, with its --strength")
    args.strength = args.strength * len(args.loras) if len(args.strength) == 1 else args.strength
    return args


def main(args: argparse.Namespace) -> None:
    """Merges in float32, casts once, and writes all or nothing."""
    if args.out.exists():  # said before a long load
        raise CheckpointError(f"{args.out}: exists already; remove it first or choose another name")
    model = load_model(args)
    networks, merged = {"lora_unet": model.unet, "lora_te": model.text_encoder}, []
    for path, strength in zip(args.loras, args.strength):
        load_lora(path, networks, str(path), strength)
        merged.append({"name": path.stem, "strength": strength, "hash": lora_hash(path)})

    # of the first file, which holds the U-Net
    own = open_weights(next(iter(model.files.values()))).dtype
    precision = args.dtype or next((name for name in DTYPES if DTYPES[name] == own), "fp32")
    dtype = DTYPES[precision]
    for prefix, network in networks.items():
        merge(network)
        for where, layer in lora_layers(network).items():
            if not layer.root.weight.to(dtype).isfinite().all():
                advice = "give a lower --strength, or --dtype fp32"
                raise LoRAError(
                    f"{args.out}: {prefix} {where} is not finite in {precision}: {advice}"
                )
            network.set_submodule(where, layer.root)  # the merged weight under its plain name

    if args.to == "folder":
        save_folder(model, args.out, dtype)
    else:
        side = model.sample_size * model.vae.config.downsampling
        facts = {
            "title": args.out.stem,
            "architecture": ARCHITECTURES.get(
                (model.unet.config.cross_attention_dim, model.prediction_type)
            ),
            "resolution": f"{side}x{side}",
            "base": {
                "name": Path(args.model).name.removesuffix(".safetensors"),
                "hash": model_hash(model.sha256()),
            },
        }
        save_single(args.out, model, dtype, metadata(facts, merged))


def metadata(facts: dict, loras: list[dict]) -> dict[str, str]:
    """What the webui and ComfyUI show of a model: the standard modelspec, and the webui's key for
    how it was merged.

    facts: `title`, `architecture` or None, `resolution`, and of the `base` its name and the webui's
        hash
    loras: of each its `name`, `strength` and the webui's `hash`

    No times and no paths: equal merges say the same.
    """
    base = facts["base"]
    keys = {
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": facts["architecture"],
        "modelspec.title": facts["title"],
        "modelspec.resolution": facts["resolution"],
        "modelspec.merged_from": ", ".join(part["name"] for part in (base, *loras)),
        "sd_merge_recipe": json.dumps({"type": "fu-lora", "base": base, "loras": loras}),
    }
    return {key: value for key, value in keys.items() if value is not None}


if __name__ == "__main__":
    run(parse_args, main, CheckpointError, LoRAError)
