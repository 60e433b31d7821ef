"""`megatron-tempo convert`: checkpoints from Hugging Face to Megatron and back, in one process without a GPU."""

from __future__ import annotations

import argparse
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path

from megatron_tempo.errors import InputError, printable
from megatron_tempo.nullgpu.guard import refuse_null_gpu
from megatron_tempo.observability.terminal import say
from megatron_tempo.runtime.folder_lock import FolderLock

DIRECTIONS = ("hf-to-megatron", "megatron-to-hf")
# The programs of tools/ that do the same, by their names.
SCRIPTS = {"convert_hf_to_megatron": "hf-to-megatron", "convert_megatron_to_hf": "megatron-to-hf"}
HELP = "convert a checkpoint from Hugging Face to Megatron, or back (docs/checkpoints.md)"
EXAMPLES = (
    "megatron-tempo convert hf-to-megatron /models/Qwen3-8B /checkpoints/qwen3-8b",
    "megatron-tempo convert megatron-to-hf /runs/one/checkpoints/step_00000040 /models/one-40",
    "megatron-tempo convert megatron-to-hf /checkpoints/qwen3-8b /models/copy --like /models/Qwen3-8B",
)
_RESUMES = "If it is stopped or killed, rerun the same command to resume after the complete files in OUT.partial."
_TO_MEGATRON = f"""\
Write a Hugging Face folder as a Megatron distributed checkpoint, which loads in any layout. One process, no GPU, memory
for the largest matrix of a layer. {_RESUMES}"""
_TO_HF = f"""\
Write a model of a run's checkpoint, or of any Megatron distributed checkpoint, as a Hugging Face folder. Any layout may
have written the checkpoint; the state of its optimizer is left out. One process, no GPU, memory for the largest saved
chunk and twice the largest matrix of a layer. {_RESUMES}"""
_MODELS = ("actor", "critic")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    directions = parser.add_subparsers(dest="direction", required=True, metavar="|".join(DIRECTIONS))
    add_to_megatron(directions.add_parser(DIRECTIONS[0], help="Hugging Face to Megatron", description=_TO_MEGATRON))
    add_to_hf(directions.add_parser(DIRECTIONS[1], help="Megatron to Hugging Face", description=_TO_HF))


def add_to_megatron(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", type=Path, metavar="HF_FOLDER", help="config.json and safetensors files")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to write; it must not exist")
    model = "what to make of it; a critic from a folder without a value head gets a head of zeros (default: actor)"
    parser.add_argument("--model", choices=_MODELS, default="actor", help=model)
    parser.add_argument("--part-gb", type=gibibytes, default="1", help="size of a file, in GiB (default: 1)")


def add_to_hf(parser: argparse.ArgumentParser) -> None:
    source = "RUN/checkpoints/step_N, or the folder of a distributed checkpoint"
    parser.add_argument("source", type=Path, metavar="CHECKPOINT", help=source)
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to write; it must not exist")
    parser.add_argument("--model", choices=_MODELS, default="actor", help="which model (default: actor)")
    like = "where config and tokenizer are (default: the folder that the run was started from)"
    parser.add_argument("--like", type=Path, metavar="HF_FOLDER", help=like)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="type to write (default: as stored)")
    shard = "largest size of a file, in GiB; a larger matrix gets a file of its own (default: 4)"
    parser.add_argument("--shard-gb", type=gibibytes, default="4", help=shard)


def gibibytes(text: str) -> int:
    """A number of GiB, in bytes."""
    try:
        size = int(float(text) * 2**30)
    except (ValueError, OverflowError):
        size = 0
    if size < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number of GiB")
    return size


def run(arguments: argparse.Namespace) -> int:
    """Convert, and print time and memory. Returns the exit status: 2 if the input is wrong, 1 if the disk failed."""
    start = time.monotonic()
    out = arguments.out
    lock = FolderLock(out.with_name(out.name + ".lock"), str(out), "convert", "choose another name")
    try:
        refuse_null_gpu("convert")
        convert = _conversion(arguments)
        with lock:
            size = convert()
    except (InputError, OSError) as error:
        print(printable(f"error: {error}"), file=sys.stderr)
        return 2 if isinstance(error, InputError) else 1
    except KeyboardInterrupt:
        print("stopped: rerun the same command to resume from here", file=sys.stderr)
        return 130
    seconds = time.monotonic() - start
    say(f"{arguments.out}: {size} bytes in {seconds:.1f} s, peak memory {peak_bytes() / 2**20:.0f} MiB")
    return 0


def _conversion(arguments: argparse.Namespace) -> Callable[[], int]:
    from megatron_tempo.models.megatron_compat.transformer_engine import check_import

    check_import()  # before the first import of Megatron-Core
    from megatron_tempo.checkpoint.convert import DTYPES, to_hugging_face, to_megatron  # slow imports: torch, Megatron

    source, out, model = arguments.source, arguments.out, arguments.model
    if arguments.direction == DIRECTIONS[0]:
        return lambda: to_megatron(source, out, model, arguments.part_gb)
    dtype = arguments.dtype and DTYPES[arguments.dtype]
    return lambda: to_hugging_face(source, out, model, arguments.like, dtype, arguments.shard_gb)


def peak_bytes() -> int:
    """The peak resident memory of this process, including mapped files."""
    status = Path("/proc/self/status")
    if status.exists():  # ru_maxrss includes the peak of the process that started this one
        kib = next(line.split()[1] for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(kib) << 10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
