"""tools/bench_kernels.py, the smallest sizes first: what is timed when the time runs out is on record."""

from __future__ import annotations

import importlib.util
import time

import torch
from bench_kernels import ceilings, compared
from bench_operations import OPERATIONS, Setup

from gpu_parts.records import Records
from gpu_parts.setting import Setting

MARGIN = 10.0  # seconds before the time limit after which no further size is begun
SMALL_TOKENS = 64


def run(setting: Setting, records: Records) -> None:
    deadline = time.monotonic() + setting.seconds - MARGIN
    setup = setup_of(setting)
    rates, without = ceilings(setup), frozenset({"compile"} if setting.small else ())
    records.figure("copy, read and written", rates[0] / 1e9, "GB/s")
    records.figure(f"matrix product, {setup.dtype}", rates[1] / 1e12, "TFLOP/s")
    for tokens, name in sizes_of(setting):
        if time.monotonic() > deadline:
            records.note(f"{name}, {tokens} tokens", "not timed: no time left")
            continue
        for row in compared(name, tokens, setup, rates, without):
            what = f"{name}, {tokens} tokens, {'forward and backward' if row.backward else 'forward'}, {row.variant}"
            if row.seconds is None:
                records.holds(f"{what}: runs", not is_fault(row.note, row.variant), row.note)
                continue
            records.figure(what, row.seconds * 1e6, "us")
            for figure, value, unit in (
                ("over the floor", row.to_floor, ""),
                ("peak in addition to results", row.beside_results_bytes and row.beside_results_bytes / 2**30, "GiB"),
                ("rate", row.tflops, "TFLOP/s"),
            ):
                if value is not None:
                    records.figure(f"{what}: {figure}", value, unit)


def is_fault(note: str, variant: str) -> bool:
    """Whether a row that was not timed is a fault of ours: the others are only compared with."""
    return variant.startswith("ours") and not note.startswith("not run")


def setup_of(setting: Setting) -> Setup:
    cuda = setting.device == "cuda"
    vocab, hidden = (1000, 64) if setting.small else (151_936, 4096)
    has_liger = importlib.util.find_spec("liger_kernel") is not None
    no_liger = "not run: not installed" if not has_liger else "" if cuda else "not run: needs CUDA"
    dtype = torch.bfloat16 if cuda else torch.float32
    return Setup(torch.device(setting.device), cuda, dtype, vocab, hidden, 5 if setting.small else 20, no_liger)


def sizes_of(setting: Setting) -> list[tuple[int, str]]:
    """(tokens, operation), the smallest first."""
    cuda = setting.device == "cuda"
    if setting.small:
        return [(SMALL_TOKENS, name) for name in OPERATIONS]
    return sorted((tokens, name) for name, (_, sizes) in OPERATIONS.items() for tokens in sizes[cuda])
