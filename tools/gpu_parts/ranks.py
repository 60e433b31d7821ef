"""Two ranks on one GPU in each layout of two, against one process: a step of actor and critic, and the weights' stream.

NCCL is used where it accepts two ranks on a GPU; else their messages go through host memory (`two`), and the records
say so.
"""

from __future__ import annotations

import time

import torch

from gpu_parts.made import write_model
from gpu_parts.rank_steps import LAYOUTS, PROBE, batch_of, configured, of_layout, result, sizes_of
from gpu_parts.records import Records
from gpu_parts.setting import Setting
from gpu_parts.training import Seen, mean_difference, share_apart
from gpu_parts.two import WORLD, free_port, last_words, start

# From one process: sums have another order, and bf16 rounds each.
NATS, VALUES, SHARE = 0.02, 0.02, 0.05
PROBE_SECONDS = 40.0


def run(setting: Setting, records: Records) -> None:
    deadline = time.monotonic() + setting.seconds - 5
    write_model(setting.folder / "ranks-model", sizes_of(setting))
    way = way_of(setting, records)
    with records.attempt("one process"):
        alone, _ = of_layout(configured(setting, None), batch_of(setting))
    left = list(LAYOUTS)
    while left and time.monotonic() < deadline:
        start("rank_steps", setting, [way, *cases(left)], deadline - time.monotonic())
        made = [name for name in left if all(result(setting, name, rank).exists() for rank in range(WORLD))]
        for name in made:
            compare(name, setting, alone, records)
        left = left[len(made) :]
        if left:  # the pair ended in this layout: a new pair takes the next one
            words = last_words(setting, "rank_steps")
            records.holds(f"{left.pop(0)}: runs to its end", False, words, numeric=False)
    for name in left:
        records.holds(f"{name}: runs to its end", False, "no time left", numeric=False)


def cases(names: list[str]) -> list[str]:
    return [f"{name}={free_port()}" for name in names]


def way_of(setting: Setting, records: Records) -> str:
    """How the ranks of this machine can talk to each other."""
    if setting.device == "cpu":
        records.note("messages", "gloo, by the way that a GPU takes where NCCL refuses")
        return "staged"
    if not records.has_numbers:
        records.note("messages", "gloo, through host memory: the null GPU's NCCL carries nothing")
        return "staged"
    codes = start("rank_steps", setting, ["direct", *cases([PROBE])], PROBE_SECONDS)
    if codes == [0] * WORLD:
        records.note("messages", "NCCL: it accepts two ranks on one GPU here")
        return "direct"
    words = last_words(setting, "rank_steps")
    records.note("messages", f"gloo, through host memory: NCCL refuses two ranks on one GPU ({words})")
    return "staged"


def compare(name: str, setting: Setting, alone: Seen, records: Records) -> None:
    for rank in range(WORLD):
        seen, stream = torch.load(result(setting, name, rank), weights_only=False)
        where = f"{name}, rank {rank}"
        for step in (0, 1):
            apart = mean_difference(seen.logprobs[step], alone.logprobs[step])
            records.at_most(f"{where}: log-probabilities after {step} steps", apart, NATS, "nats a token")
            apart = mean_difference(seen.values[step], alone.values[step])
            records.at_most(f"{where}: values after {step} steps", apart, VALUES)
        for metric in ("actor/grad_norm", "critic/grad_norm", "critic/loss"):
            share = share_apart(seen.metric(1, metric), alone.metric(1, metric))
            records.at_most(f"{where}: {metric}, share from one process", share, SHARE)
        for what, count in stream.items():
            if "differ" in what:
                records.at_most(f"{where}: weights streamed {what}", float(count), 0.0)
            else:
                records.figure(f"{where}: weights streamed {what}", count)
