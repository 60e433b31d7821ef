"""Three steps of actor and critic: bf16 against fp32, with recomputation and offload on and off, and a resume."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import product
from pathlib import Path

import torch

from gpu_parts.made import MIDDLE, SMALL, rollouts, write_model
from gpu_parts.records import Records
from gpu_parts.setting import Setting
from gpu_parts.training import Seen, config_of, mean_difference, narrow, opened, share_apart
from megatron_tempo.checkpoint.checkpoints import Checkpoints
from megatron_tempo.config.choices import Layers, Precision, Recompute
from megatron_tempo.config.schema import Config
from megatron_tempo.models.machine import machine_of
from megatron_tempo.types import Batch

STEPS, SAVED = 3, 2  # steps; the one after which the run is saved
# bf16 against fp32: nats a token, values, share of a gradient's norm and of a loss.
NATS, VALUES, SHARE = 0.05, 0.05, 0.1
MOVED = 1e-3  # the least by which the steps change log-probabilities: otherwise nothing is compared
# bf16 against itself with other memory settings. The operations are the same, but an atomic sum may have another order.
AGAIN = 5e-3


def run(setting: Setting, records: Records) -> None:
    sizes = SMALL if setting.small else MIDDLE
    model = write_model(setting.folder / "steps-model", sizes)
    rows, longest = (8, 40) if setting.small else (64, 400)
    batch = rollouts(sizes.vocab, [(5 + row % 7, 2 + row * longest // rows) for row in range(rows)])
    exact = of_steps(config_of(setting, model, Precision.fp32), batch)
    records.figure("fp32: actor's gradient norm", exact.metric(1, "actor/grad_norm"))
    moved = mean_difference(exact.logprobs[STEPS], exact.logprobs[0])
    records.between("fp32: log-probabilities, moved by the steps", moved, MOVED, math.inf, "nats a token")
    base: Seen | None = None
    for name, config in variants(setting, model):
        with records.attempt(name):
            found = of_steps(config, batch)
            against_exact(name, found, exact, records)
            if base is not None and config.model.layers is Layers.local:
                against_same(name, found, base, STEPS, records)
            base = base or found
    with records.attempt("save and resume"):
        folder = setting.folder / "steps-checkpoints"
        resumed = of_resume(config_of(setting, model, narrow(setting)), batch, folder)
        assert base is not None
        against_same("saved after two steps and resumed", resumed, base, STEPS, records)


def variants(setting: Setting, model: Path) -> Iterator[tuple[str, Config]]:
    """bf16 with every setting of recomputation and offload, the plain one first; last, Transformer Engine's layers.

    On a CPU it is fp32 again.
    """
    cases = list(product(Recompute, (False, True)))
    for recompute, offload in (cases[0], cases[-1]) if setting.small else cases:
        config = config_of(setting, model, narrow(setting))
        config.parallel.recompute, config.parallel.offload = recompute, offload
        yield f"{config.run.precision.value}, recompute {recompute.value}, offload {'on' if offload else 'off'}", config
    if setting.device == "cuda" and machine_of(torch.device("cuda", 0)).te is not None:
        yield "bf16, Transformer Engine", config_of(setting, model, Precision.bf16, Layers.transformer_engine)


def of_steps(config: Config, batch: Batch) -> Seen:
    seen = Seen()
    with opened(config) as pair:
        pair.look(seen, 0, batch)
        for step in range(1, STEPS + 1):
            pair.step(seen, step, batch)
        pair.look(seen, STEPS, batch)
    return seen


def of_resume(config: Config, batch: Batch, folder: Path) -> Seen:
    """Two steps and a checkpoint; then, with models built anew, the third step."""
    seen = Seen()
    with opened(config) as pair:
        checkpoints = Checkpoints(folder, 1, pair.context.layouts.actor)
        for step in range(1, SAVED + 1):
            pair.step(seen, step, batch)
        checkpoints.save(SAVED, pair.models(), {})
        checkpoints.wait()
        checkpoints.close()
    with opened(config) as pair:
        checkpoints = Checkpoints(folder, 1, pair.context.layouts.actor)
        checkpoints.load(checkpoints.find(), pair.models())
        for step in range(SAVED + 1, STEPS + 1):
            pair.step(seen, step, batch)
        pair.look(seen, STEPS, batch)
    return seen


def against_exact(name: str, found: Seen, exact: Seen, records: Records) -> None:
    for step in (0, STEPS):
        apart = mean_difference(found.logprobs[step], exact.logprobs[step])
        records.at_most(f"{name}: log-probabilities from fp32 after {step} steps", apart, NATS, "nats a token")
    apart = mean_difference(found.values[STEPS], exact.values[STEPS])
    records.at_most(f"{name}: values from fp32 after {STEPS} steps", apart, VALUES)
    for step, metric in product(range(1, STEPS + 1), ("actor/grad_norm", "critic/grad_norm", "critic/loss")):
        share = share_apart(found.metric(step, metric), exact.metric(step, metric))
        records.at_most(f"{name}: {metric} of step {step}, share from fp32", share, SHARE)


def against_same(name: str, found: Seen, base: Seen, step: int, records: Records) -> None:
    for what, one, other in (
        ("log-probabilities", found.logprobs[step], base.logprobs[step]),
        ("values", found.values[step], base.values[step]),
    ):
        records.at_most(f"{name}: {what} from the plain run", mean_difference(one, other), AGAIN)
    same = torch.equal(found.logprobs[step], base.logprobs[step]) and torch.equal(found.values[step], base.values[step])
    records.note(f"{name}: the same bits as the plain run", "yes" if same else "no")
