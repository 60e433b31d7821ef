"""Make the second task: questions, tokenizer and base models: python tools/make_logic_dates.py

Boolean expressions and dates in free text, in the form of two tasks of BIG-Bench Hard (docs/second_task.md). Two small
Qwen3 are pretrained on reasoning of mixed quality: `plain` makes random errors, `misled` has a misconception. The
questions depend only on --seed. The weights depend on the arguments and on the machine's floating-point arithmetic.
What is complete is not made again.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from pathlib import Path
from typing import Any

import torch
from base_models import pretrain
from logic_parts.habits import BASES
from logic_parts.model import batches, make_model, make_tokenizer
from logic_parts.task import COUNTS, Row, make_sets, pretraining
from transformers import PreTrainedTokenizerFast

from megatron_tempo.files import replace_file

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "build" / "logic-dates"
RECORD = "made.json"  # of a base model's folder: the arguments that it was made with; written last
TOKENIZER_TEXTS, TOKENIZER_SEED = 6000, 7  # both bases have the same tokenizer


def questions_file(rows: list[Row]) -> str:
    lines = [
        {
            "id": row.id,
            "prompt": row.question.prompt,
            "answer": row.question.answer,
            "kind": row.kind,
            "level": row.level,
            "misleading": row.question.is_misleading,
        }
        for row in rows
    ]
    return "".join(json.dumps(line) + "\n" for line in lines)


def common_tokenizer(sets: dict[str, list[Row]]) -> PreTrainedTokenizerFast:
    texts = itertools.islice(pretraining(sets, BASES["misled"], TOKENIZER_SEED), TOKENIZER_TEXTS)
    return make_tokenizer(f"{prompt}\n{response}" for prompt, response in texts)


def make_base(folder: Path, base: str, sets: dict[str, list[Row]], settings: dict[str, Any]) -> None:
    """Pretrain a base model and save it as a Hugging Face folder. Both bases start from the same weights."""
    tokenizer = common_tokenizer(sets)
    torch.manual_seed(settings["seed"])
    model = make_model(tokenizer, settings["layers"], settings["hidden"], settings["ffn"])
    stream = pretraining(sets, BASES[base], settings["seed"])
    rows = batches(tokenizer, stream, settings["rows"], settings["seed"])
    print(f"{base}: {sum(parameter.numel() for parameter in model.parameters())} parameters", flush=True)
    pretrain(model, rows, steps=settings["steps"], lr=settings["lr"])
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)
    replace_file(folder / RECORD, json.dumps(settings, indent=2) + "\n", fsync=False)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=OUT, help="folder to write to")
    parser.add_argument("--force", action="store_true", help="replace files made with other arguments")
    parser.add_argument("--bases", nargs="*", choices=list(BASES), default=list(BASES), help="models to make")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--steps", type=int, default=1000, help="pretraining steps")
    parser.add_argument("--rows", type=int, default=64, help="questions per step")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--ffn", type=int, default=512)
    args = parser.parse_args()
    for name in ("steps", "rows", "lr", "layers", "hidden", "ffn"):
        if getattr(args, name) <= 0:
            parser.error(f"--{name} {getattr(args, name)}: must be positive")
    return args


def main() -> int:
    args = parse()
    sets = make_sets(args.seed)
    settings = {name: value for name, value in vars(args).items() if name not in ("out", "force", "bases")}
    files = {args.out / f"{name}.jsonl": questions_file(sets[name]) for name in COUNTS}
    made = {base: record(args.out / base / RECORD) for base in args.bases}
    others = [path for path, text in files.items() if path.exists() and path.read_text(encoding="utf-8") != text]
    others += [args.out / base for base, one in made.items() if one is not None and one != settings]
    if others and not args.force:
        names = ", ".join(map(str, others))
        print(f"made with other arguments: {names}; --force replaces them, --out writes elsewhere", file=sys.stderr)
        return 2
    args.out.mkdir(parents=True, exist_ok=True)
    for path, text in files.items():
        replace_file(path, text, fsync=False)
    for base, one in made.items():
        if one == settings:
            print(f"{args.out / base} is complete")
        else:
            make_base(args.out / base, base, sets, settings)
    return 0


def record(path: Path) -> dict[str, Any] | None:
    """The arguments that a base model was made with. None if it is not complete."""
    if not path.exists():
        return None
    settings: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return settings


if __name__ == "__main__":
    sys.exit(main())
