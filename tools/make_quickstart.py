"""Make the quickstart's questions, tokenizer and base model: python tools/make_quickstart.py --out examples/quickstart

A small Qwen3 is pretrained on countdown traces of mixed quality (about four minutes on one core). The data depends only
on --seed. The weights depend on --seed and on the machine's floating-point arithmetic.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
from collections.abc import Iterator
from pathlib import Path

import torch
from base_models import pretrain, small_qwen3
from countdown_task import MISLED, SOLVED, Question, Split, split, traces
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from megatron_tempo.rewards.countdown import CHECKS, END, LARGEST, OPERATORS

PAD = "<pad>"
OUTPUTS = ("model", "labelled.jsonl", "unlabelled.jsonl", "heldout.jsonl")


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token per word. A word that is not in the vocabulary is an error, not an unknown token."""
    words = [*map(str, range(LARGEST + 1)), *OPERATORS, "=", ">", ":", *CHECKS, END, PAD]
    tokenizer = Tokenizer(WordLevel({word: index for index, word in enumerate(words)}))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=PAD,
        clean_up_tokenization_spaces=False,
        model_max_length=32,
    )


def make_model(tokenizer: PreTrainedTokenizerFast, layers: int, hidden: int, ffn: int) -> Qwen3ForCausalLM:
    """A Qwen3 whose heads, layers and widths are divisible by two, for tensor and pipeline parallelism."""
    sizes = {"layers": layers, "hidden": hidden, "ffn": ffn, "head_dim": 16, "positions": 64}
    return small_qwen3(tokenizer, vocab=len(tokenizer), **sizes)


def widened(model: Qwen3ForCausalLM) -> Qwen3ForCausalLM:
    """The same function with heads of twice the size, half of it zeros. On a CPU, vLLM does not support heads of 16.

    In a head of size d, the rotary embedding rotates dimensions i and i + d/2 together, at frequency i. In a head of
    size 2d, frequency i of the small head is frequency 2i. So dimension i moves to 2i, and i + d/2 to 2i + d. Root mean
    squares decrease, and logits increase, by sqrt(2). The zeros have no gradient, so they stay zero in training.
    """
    config = Qwen3Config.from_dict(model.config.to_dict() | {"head_dim": 2 * model.config.head_dim})
    wide = Qwen3ForCausalLM(config)
    dim = model.config.head_dim
    moved = torch.cat([torch.arange(0, dim, 2), dim + torch.arange(0, dim, 2)])
    state = {}
    for name, tensor in model.state_dict().items():
        if name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight")):
            heads = tensor.unflatten(0, (-1, dim))
            state[name] = (
                heads.new_zeros(len(heads), 2 * dim, tensor.shape[1]).index_copy(1, moved, heads).flatten(0, 1)
            )
        elif name.endswith("o_proj.weight"):
            heads = tensor.unflatten(1, (-1, dim))
            state[name] = (
                heads.new_zeros(len(tensor), heads.shape[1], 2 * dim).index_copy(2, moved, heads).flatten(1, 2)
            )
        elif name.endswith(("q_norm.weight", "k_norm.weight")):
            factor = 1.0 if "q_norm" in name else math.sqrt(0.5)
            state[name] = tensor.new_ones(2 * dim).index_copy(0, moved, tensor * factor)
        else:
            state[name] = tensor
    wide.load_state_dict(state)
    return wide


def batches(
    tokenizer: PreTrainedTokenizerFast, questions: list[Question], rows: int, seed: int, misled: float
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Tokens and labels of traces, both [rows, length]. Labels of prompts are -100."""
    prompt_length = len(tokenizer(questions[0].prompt)["input_ids"])
    stream = traces(questions, seed, misled)
    while True:
        tokens = torch.tensor(tokenizer(list(itertools.islice(stream, rows)))["input_ids"])
        labels = tokens.clone()
        labels[:, :prompt_length] = -100
        yield tokens, labels


def write_questions(path: Path, name: str, questions: list[Question]) -> None:
    rows = [
        {"id": f"{name}:{index}", "prompt": question.prompt, "answer": question.solutions[0]}
        for index, question in enumerate(questions)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    parser.add_argument("--force", action="store_true", help="replace the files of an earlier run")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--labelled", type=int, default=6000, help="questions")
    parser.add_argument("--unlabelled", type=int, default=512, help="questions")
    parser.add_argument("--heldout", type=int, default=256, help="questions")
    parser.add_argument("--steps", type=int, default=1200, help="pretraining steps; 0: only the questions, no model")
    parser.add_argument("--rows", type=int, default=256, help="traces per step")
    parser.add_argument("--lr", type=float, default=4e-3)
    parser.add_argument(
        "--misled", type=float, default=MISLED, help="share of traces with the misconception; 0: a base without one"
    )
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--ffn", type=int, default=256)
    args = parser.parse_args()
    if not 0 <= args.misled <= 1 - SOLVED:
        parser.error(f"--misled {args.misled}: must be between 0 and {1 - SOLVED}")

    existing = [str(args.out / name) for name in OUTPUTS if (args.out / name).exists()]
    if existing and not args.force:
        parser.error(f"these files exist: {', '.join(existing)}; --force replaces them")

    sets: Split = split(args.seed, args.labelled, args.unlabelled, args.heldout)
    args.out.mkdir(parents=True, exist_ok=True)
    for name in ("labelled", "unlabelled", "heldout"):
        write_questions(args.out / f"{name}.jsonl", name, getattr(sets, name))
    if args.steps:
        torch.manual_seed(args.seed)
        tokenizer = make_tokenizer()
        model = make_model(tokenizer, args.layers, args.hidden, args.ffn)
        data = batches(tokenizer, sets.pretraining, args.rows, args.seed, args.misled)
        pretrain(model, data, steps=args.steps, lr=args.lr)
        tokenizer.save_pretrained(args.out / "model")
        widened(model).save_pretrained(args.out / "model")


if __name__ == "__main__":
    main()
