"""Time the verification of an iteration's responses: python tools/bench_verification.py --workers 4

The responses are made up: reasoning of `--tokens` tokens that ends in an answer of one of many forms, in a box or in a
sentence. One in ten ends within its thought. Half of the prompts are labelled, the others' answers are compared with
one another. The tokenizer is trained on the spot, on the sources of Python's standard library, unless `--tokenizer`
gives a folder. No engine and no model take part.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import sysconfig
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import transformers
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from megatron_tempo.rewards.verifiers import Verifiers
from megatron_tempo.rollout.verification import Prompt, Verification
from megatron_tempo.types import Completion, LabelledPrompt, UnlabelledPrompt

FORMS = Path(__file__).parents[1] / "tests" / "fixtures" / "answer_forms.json"
WORDS = (
    *("we", "compute", "the", "sum", "of", "both", "sides", "and", "then", "divide", "by", "so", "that", "remaining"),
    *("term", "equals", "which", "means", "let", "us", "check", "again", "wait", "no", "is", "wrong", "therefore"),
    *("consider", "case", "where", "number", "integer", "prime", "factor"),
)
FILLERS = 16
CORPUS_FILES = 1200  # of the standard library, some 20 MB


def trained(folder: Path) -> None:
    """Write a byte-level BPE tokenizer with 60,000 tokens."""
    sources = sorted(Path(sysconfig.get_paths()["stdlib"]).rglob("*.py"))
    sources = [path for path in sources if "site-packages" not in path.parts][:CORPUS_FILES]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=60_000,
        special_tokens=["<|endoftext|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((path.read_text(errors="replace") for path in sources), trainer)
    tokenizer.add_tokens([AddedToken(tag, special=False) for tag in ("<think>", "</think>")])
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    ).save_pretrained(folder)


def reasoning(rng: random.Random, words: int) -> str:
    pieces = []
    for _ in range(words):
        pieces.append(rng.choice(WORDS))
        if rng.random() < 0.2:
            a, b, c = (rng.randint(1, 9999) for _ in range(3))
            pieces.append(f"${a} + x^{{{b % 9}}} = \\frac{{{b}}}{{{c}}}$")
        if rng.random() < 0.05:
            pieces.append(rng.choice([".\n\n", f"so \\boxed{{{rng.randint(1, 99)}}}? no"]))
    return " ".join(pieces)


class Responses:
    """Made-up prompts, each with its responses."""

    def __init__(self, tokenizer: transformers.PreTrainedTokenizerBase, tokens: int, seed: int) -> None:
        self._rng, self._tokenizer, self._tokens = random.Random(seed), tokenizer, tokens
        self._fillers = [self._encoded(reasoning(self._rng, tokens))[:tokens] for _ in range(FILLERS)]
        self._forms: list[tuple[str, str]] = [tuple(pair) for pair in json.loads(FORMS.read_text())["math"]["right"]]

    def of_prompts(self, count: int, samples: int) -> Iterator[tuple[int, Prompt, list[Completion]]]:
        for i in range(count):
            answer, _ = self._rng.choice(self._forms)
            right = [form for gold, form in self._forms if gold == answer]
            ids = tuple(self._encoded(f"What is it? {i}\n<think>\n"))
            prompt: Prompt = (
                LabelledPrompt(str(i), f"What is it? {i}", ids, answer, "math")
                if i % 2
                else UnlabelledPrompt(str(i), f"What is it? {i}", ids)
            )
            yield i, prompt, [self._completion(right) for _ in range(samples)]

    def _completion(self, right: list[str]) -> Completion:
        rng = self._rng
        form = rng.choice(right) if rng.random() < 0.6 else rng.choice(self._forms)[1]
        if rng.random() < 0.1:
            form = f"So the answer is {rng.randint(1, 999)}."
        end = [*self._encoded(f"\n</think>\n\nAltogether we get {form}"), self._tokenizer.eos_token_id]
        reason = "stop"
        if rng.random() < 0.1:
            end, reason = [], "length"
        filler = rng.choice(self._fillers)
        tokens = torch.tensor(filler[: self._tokens - len(end)] + end, dtype=torch.int32)
        return Completion(tokens, torch.zeros(len(tokens)), reason, ((0, len(tokens)),))

    def _encoded(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False)


class Delays:
    """How late a thread wakes up that sleeps for a millisecond at a time: it waits for Python's lock."""

    def __init__(self) -> None:
        self.late: list[float] = []
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Delays:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _run(self) -> None:
        last = time.perf_counter()
        while not self._over.is_set():
            time.sleep(0.001)
            now = time.perf_counter()
            self.late.append(now - last - 0.001)
            last = now


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=256)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=16_384)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--tokenizer", type=Path)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if args.tokenizer is None:
            trained(Path(folder))
        tokenizer = transformers.AutoTokenizer.from_pretrained(args.tokenizer or folder)
        made = list(Responses(tokenizer, args.tokens, args.seed).of_prompts(args.prompts, args.samples))
        measure(args, tokenizer, made)


def measure(
    args: argparse.Namespace,
    tokenizer: transformers.PreTrainedTokenizerBase,
    made: list[tuple[int, Prompt, list[Completion]]],
) -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with Verifiers(args.workers) as verifiers:
        verifiers.has_value("math", ["1"] * args.workers * 4)  # starts the workers
        wall, own = time.perf_counter(), time.process_time()
        with Delays() as delays, Verification(verifiers, tokenizer, "math") as verification:
            caller = time.thread_time()
            for i, prompt, completions in made:
                verification.submit(i, prompt, completions)
            caller = time.thread_time() - caller
            submitted = time.perf_counter() - wall
            verdicts, classes = verification.results()
        wall, own = time.perf_counter() - wall, time.process_time() - own
        counts = verifiers.take_counts()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    children = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - held) / 1024
    right = sum(sum(row) for row in verdicts.values())
    answered = sum(number is not None for row in classes.values() for number in row)
    print(f"{args.prompts * args.samples} responses of {args.tokens} tokens, {args.workers} workers")
    print(f"wall {wall:.1f} s, of which submitting {submitted:.1f} s")
    print(f"processor time: this process {own:.1f} s, of which the caller {caller:.1f} s; workers {children:.1f} s")
    print(f"delays of another thread: {sum(delays.late):.2f} s in all, longest {max(delays.late) * 1e3:.0f} ms")
    print(f"peak memory of this process: +{peak:.0f} MB")
    print(f"right {right:g} of {sum(map(len, verdicts.values()))}, with an answer {answered}, {counts}")


if __name__ == "__main__":
    main()
