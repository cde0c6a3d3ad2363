"""Makes samplers.safetensors: sampler trajectories of diffusers, k-diffusion and UniPC's authors.

    python tests/references/make_samplers.py ../shared/reference/golden

Cut, unchanged, out of the reference collection: all trajectories of 1, 2, 3 and 5 steps, and ten at
the paper's setting (20 steps, guidance 7). Tensors: "ID.x" the predicted states, "ID.xc" UniPC's
corrected ones, a record's sigmas and times; in the header "records", and "versions" of the programs
that made them. The collection's own README describes the fields.
"""

import argparse
import json
from pathlib import Path

from safetensors.torch import load_file, save_file


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("golden", type=Path, help="folder of index.json and samplers.safetensors")
    golden = parser.parse_args().golden
    index = json.loads((golden / "index.json").read_text())
    tensors = load_file(golden / "samplers.safetensors")

    papers = [f"r{number:04}" for number in range(643, 653)]
    records = [r for r in index["records"] if r["steps"] in (1, 2, 3, 5) or r["id"] in papers]
    ids = {record["id"] for record in records}
    names = {record[key] for record in records for key in ("sigmas", "timesteps")}
    names |= {name for name in tensors if name.partition(".")[0] in ids}
    metadata = {"records": json.dumps(records), "versions": json.dumps(index["versions"])}
    target = Path(__file__).with_name("samplers.safetensors")
    save_file({name: tensors[name] for name in sorted(names)}, target, metadata)


if __name__ == "__main__":
    main()
