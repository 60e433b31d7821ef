"""Write a model of a run's checkpoint, or of any Megatron distributed checkpoint, as a Hugging Face folder.

    python tools/convert_megatron_to_hf.py /runs/one/checkpoints/step_00000040 /models/one-40
    python tools/convert_megatron_to_hf.py /checkpoints/qwen3-8b /models/copy --like /models/Qwen3-8B

Any layout may have written the checkpoint. Its optimizer state is not converted. The conversion runs in one process
without a GPU, and needs memory for the largest saved chunk and twice the largest matrix of a layer. If it is stopped or
killed, rerun the same command to resume after the complete files. These are in OUT.partial until all are complete.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path

from conversion_command import gibibytes, run


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "source", type=Path, metavar="CHECKPOINT", help="RUN/checkpoints/step_N, or a folder that Megatron wrote"
    )
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to write; it must not exist")
    parser.add_argument(
        "--model", choices=("actor", "critic"), default="actor", help="the model to convert (default: actor)"
    )
    parser.add_argument(
        "--like",
        type=Path,
        metavar="HF_FOLDER",
        help="folder with the config and the tokenizer (default: the folder that the run was started from)",
    )
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="type to write (default: as stored)")
    parser.add_argument(
        "--shard-gb",
        type=gibibytes,
        default="4",
        help="maximum size of a file, in GiB; a larger matrix gets a file of its own (default: 4)",
    )
    args = parser.parse_args()

    import torch  # seconds of imports, which --help does not need

    from megatron_tempo.checkpoint.convert import to_hugging_face

    dtype, log = args.dtype and getattr(torch, args.dtype), partial(print, flush=True)
    return run(
        lambda: to_hugging_face(args.source, args.out, args.model, args.like, dtype, args.shard_gb, log), args.out
    )


if __name__ == "__main__":
    sys.exit(main())
