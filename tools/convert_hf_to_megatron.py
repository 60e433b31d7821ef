"""Write a Hugging Face folder as a Megatron distributed checkpoint, which loads in any layout.

    python tools/convert_hf_to_megatron.py /models/Qwen3-8B /checkpoints/qwen3-8b

It runs in one process without a GPU, and needs memory for the largest matrix of a layer. If it is stopped or killed,
rerun the same command to resume after the complete parts. These are in OUT.partial until all are complete.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path

from conversion_command import gibibytes, run


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, metavar="HF_FOLDER", help="config.json and safetensors files")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to write; it must not exist")
    parser.add_argument(
        "--model",
        choices=("actor", "critic"),
        default="actor",
        help="the model to write; a critic gets a value head of zeros if the folder has none (default: actor)",
    )
    parser.add_argument("--part-gb", type=gibibytes, default="1", help="size of a file, in GiB (default: 1)")
    args = parser.parse_args()

    from megatron_tempo.checkpoint.convert import to_megatron  # seconds of imports, which --help does not need

    log = partial(print, flush=True)
    return run(lambda: to_megatron(args.source, args.out, args.model, args.part_gb, log), args.out)


if __name__ == "__main__":
    sys.exit(main())
