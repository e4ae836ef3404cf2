"""Put a trained story model into the package: weights as float16, read back as float32.

python tools/story_model/export.py runs/story-model/run/model src/steersman/assets/story-model
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

LIMIT = 6_000_000  # bytes of the whole folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    args = parser.parse_args()

    AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).half().save_pretrained(args.out)
    AutoTokenizer.from_pretrained(args.model).save_pretrained(args.out)
    config = args.out / "config.json"
    # the precision named here is the one that from_pretrained gives: half weights on disk, arithmetic in float32
    config.write_text(json.dumps(json.loads(config.read_text()) | {"dtype": "float32"}, indent=2) + "\n")
    size = sum(f.stat().st_size for f in args.out.iterdir())
    assert size < LIMIT, f"{args.out} has {size} bytes; at most {LIMIT} may ship"
    print(f"{args.out}: {size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
