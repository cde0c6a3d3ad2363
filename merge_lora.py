"""LoRAs put into a base model for good, for the programs that want one file or folder.

    python merge_lora.py v1-5.safetensors fetal.safetensors --strength 0.8 --out out.safetensors

W0 + strength * (alpha / r) * B A (the paper's eq. 2), summed in float32 and cast once.
"""

import argparse
import json
import shutil
from pathlib import Path

from harness.flags import HelpFormatter
from harness.script import run
from ldm import CheckpointError
from ldm.checkpoints import save_folder, save_single
from ldm.checkpoints.weights import open_weights
from ldm.cli import DTYPES, add_model_arguments, load_model, lora_path, one_of_each
from ldm.webui.shots import lora_hash, model_hash
from lora.files import load_loras
from lora.files.metadata import ARCHITECTURES, trained_otherwise
from lora.layer import LoRAError
from planes.captions import PROMPTS_FILE, prompts_file


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.usage = "%(prog)s MODEL LORA [LORA ..] --out OUT [flags]"
    add = parser.add_argument
    add_model_arguments(parser, positional=True)
    add(
        "loras",
        metavar="LORA",
        type=lora_path,
        nargs="+",
        help="of kohya, PEFT or diffusers: files or hub ids",
    )
    add("--out", type=Path, required=True, help="NAME.safetensors, or a folder for diffusers")
    add("--strength", type=float, nargs="+", default=[1.0], help="one of all LoRAs, or one of each")
    add("--dtype", choices=DTYPES, help="of the weights that are written (else: the base's own)")
    args = parser.parse_args(argv)
    if args.out.suffix in (".ckpt", ".pt", ".pth", ".bin"):
        parser.error(f"--out {args.out}: a single file has a name in .safetensors")
    args.strength = one_of_each(parser, "--strength", args.strength, args.loras)
    return args


def main(args: argparse.Namespace) -> None:
    """Merges in float32, casts once, and writes all or nothing."""
    if args.out.exists():  # said before a long load
        raise CheckpointError(f"{args.out}: exists already; remove it first or choose another name")
    model = load_model(args)
    networks = {"lora_unet": model.unet, "lora_te": model.text_encoder}
    for path, file in zip(args.loras, load_loras([*zip(args.loras, args.strength)], networks)):
        for difference in trained_otherwise(file.metadata, 1, model.prediction_type):
            print(f"{path}: {difference}")

    # of the first file, which holds the U-Net
    own = open_weights(next(iter(model.files.values()))).dtype
    precision = args.dtype or next((name for name in DTYPES if DTYPES[name] == own), "fp32")
    for name, weight in model.networks.named_parameters():
        if not weight.to(DTYPES[precision]).isfinite().all():
            advice = "give a lower --strength, or --dtype fp32"
            raise LoRAError(f"{args.out}: {name} is not finite in {precision}: {advice}")
    prompts = prompts_file(args.loras, args.model)  # whose classes sample.py draws
    if args.out.suffix != ".safetensors":
        save_folder(model, args.out, DTYPES[precision])
        if prompts:
            shutil.copyfile(prompts, args.out / PROMPTS_FILE)
        return
    if prompts:
        print(f"a file holds no prompts; to sample its own classes: sample.py --prompts {prompts}")

    # what the webui and ComfyUI show of it; no times and no paths: equal merges say the same
    base = {
        "name": Path(args.model).name.removesuffix(".safetensors"),
        "hash": model_hash(model.sha256()),
    }
    loras = [
        {"name": path.stem, "strength": strength, "hash": lora_hash(path)}
        for path, strength in zip(args.loras, args.strength)
    ]
    side = model.sample_size * model.vae.config.downsampling
    facts = {
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.title": args.out.stem,
        "modelspec.resolution": f"{side}x{side}",
        "modelspec.merged_from": ", ".join(part["name"] for part in (base, *loras)),
        "sd_merge_recipe": json.dumps({"type": "fu-lora", "base": base, "loras": loras}),
    }
    kind = model.unet.config.cross_attention_dim, model.prediction_type
    if kind in ARCHITECTURES:
        facts["modelspec.architecture"] = ARCHITECTURES[kind]
    save_single(args.out, model, DTYPES[precision], facts)


if __name__ == "__main__":
    run(parse_args, main, CheckpointError, LoRAError)
