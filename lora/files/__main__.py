"""Converts a LoRA file: python -m lora.files IN OUT --to kohya or peft."""

import argparse
import sys
from pathlib import Path

from lora.files import convert
from lora.layer import LoRAError


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        prog="python -m lora.files", description="Converts a LoRA file, without a model."
    )
    parser.add_argument(
        "source", type=Path, metavar="IN", help="a file of any layout, or PEFT's folder"
    )
    parser.add_argument("out", type=Path, metavar="OUT", help="the .safetensors file to write")
    parser.add_argument(
        "--to", required=True, choices=["kohya", "peft"], help="for webui and ComfyUI, or diffusers"
    )
    return parser.parse_args(argv)


def main(args):
    """Converts a file; a mistake is one line on stderr and exit code 2, and nothing is written."""
    try:
        convert(args.source, args.out, args.to)
    except (LoRAError, OSError) as error:
        sys.stderr.write(f"lora.files: {error}\n")
        sys.exit(2)


if __name__ == "__main__":
    main(parse_args())
