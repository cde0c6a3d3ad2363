"""Makes samplers_golden_small.{json,safetensors}: the ten sampler trajectories at the paper's
setting.

    python tests/references/make_samplers_golden_small.py ../shared/reference/golden

They are the last ten records of the reference collection (20 steps, guidance 7, both samplers,
float64 and float32), copied unchanged with the versions of the programs that made them. The
collection's own README describes the fields.
"""

import argparse
import json
from pathlib import Path

from safetensors.torch import load_file, save_file

IDS = [f"r{number:04}" for number in range(643, 653)]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("golden", type=Path, help="folder of index.json and samplers.safetensors")
    golden = parser.parse_args().golden
    index, tensors = (
        json.loads((golden / "index.json").read_text()),
        load_file(golden / "samplers.safetensors"),
    )

    records = [record for record in index["records"] if record["id"] in IDS]
    names = {record[key] for record in records for key in ("sigmas", "timesteps")}
    names |= {name for name in tensors if name.partition(".")[0] in IDS}

    target = Path(__file__).parent / "samplers_golden_small"
    text = json.dumps(
        {"versions": index["versions"], "betas": index["betas"], "records": records}, indent=1
    )
    target.with_suffix(".json").write_text(text + "\n")
    save_file({name: tensors[name] for name in sorted(names)}, target.with_suffix(".safetensors"))


if __name__ == "__main__":
    main()
