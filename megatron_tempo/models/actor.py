"""The actor: the policy pi_theta, which is trained."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace

import torch
from torch import Tensor

from megatron_tempo.config.method_settings import Baseline
from megatron_tempo.config.updates import ActorUpdateConfig
from megatron_tempo.kernels.advantages import token_advantages
from megatron_tempo.kernels.policy_loss import ROW_METRICS, Experience
from megatron_tempo.kernels.rows import Rows
from megatron_tempo.models.gpt import LanguageModel
from megatron_tempo.models.nonfinite_guard import LossInputs, NonFiniteGuard
from megatron_tempo.models.packing import MicroBatch, row_owners, row_work, value_cells
from megatron_tempo.models.parallel import gather_rows
from megatron_tempo.models.trained import Model, TrainedModel
from megatron_tempo.models.update import Steps, run_mini_batches
from megatron_tempo.types import Batch


class Actor:
    """Computes log-probabilities and policy updates, of the distribution that the rollouts are sampled from."""

    def __init__(self, model: Model, guard: NonFiniteGuard | None = None) -> None:
        """`guard`: None if the model is not trained."""
        assert all(isinstance(chunk, LanguageModel) for chunk in model.net.chunks)
        self.model, self.guard = model, guard
        self.kernels = model.net.kernels

    @property
    def layers(self) -> list[int]:
        """The layers, from 0, in which recorded experts are replayed or compared on this rank; none without them."""
        return [] if self.model.replay is None else self.model.replay.layers

    def logprobs(self, batch: Batch, *, replays: bool | None = None) -> Tensor:
        """log pi(y_t | x, y_<t) of every response token of the rows that this rank owns: float32 [T].

        `replays`: whether recorded experts are replayed; None: as `model.router_replay` says.
        """
        return self._read(batch, 0, replays)

    def entropies(self, batch: Batch) -> Tensor:
        """The entropy of pi(. | x, y_<t) at every response token of the rows that this rank owns, in nats: float32 [T].

        A pass of its own, with the experts of `logprobs`.
        """
        return self._read(batch, 1, None)

    def self_certainty(self, batch: Batch) -> Tensor:
        """KL(U || pi(. | x, y_<t)) at every response token of the rows that this rank owns, in nats: float32 [T].

        U is uniform over the vocabulary. pi is at the sampling temperature, before the sampling truncates it. A pass of
        its own, with the experts of `logprobs`.
        """
        chunks = [chunk for chunk in self.model.net.chunks if isinstance(chunk, LanguageModel)]
        for chunk in chunks:
            chunk.reads_certainty = True
        try:
            return self._read(batch, 0, None)
        finally:
            for chunk in chunks:
                chunk.reads_certainty = False

    def _read(self, batch: Batch, which: int, replays: bool | None) -> Tensor:
        """One of the numbers that the model gives for each response token: float32 [T]."""

        def cells(micro: MicroBatch) -> Tensor:
            return micro.response_cells

        replay = self.model.replay
        with nullcontext() if replay is None else replay.counting(replays=replays):
            size = len(batch.response_tokens)
            return self.model.read(batch, self.owners(batch), size, cells, lambda output: output[which])

    def routing_agreement(self) -> float | None:
        """Of (token, layer) with recorded experts, the share in which this actor's routers choose the same ones.

        Of all passes of `logprobs` since the last call. None: nothing is recorded. Collective.
        """
        return None if self.model.replay is None else self.model.replay.take_agreement()

    def owners(self, batch: Batch) -> Tensor:
        """The data-parallel rank that computes each row: int64 [n]."""
        return self.divided(batch) if batch.owners is None else batch.owners.actor

    def divided(self, batch: Batch, order: Sequence[Tensor] = ()) -> Tensor:
        """The rows divided by work, each mini-batch of `order` and all other rows: a data-parallel rank each, [n]."""
        work = row_work(batch.lengths, self.model.net.shape, batch.response_lengths)
        return row_owners(work, order, self.model.layout.data)

    def gather(self, batch: Batch, of_held: Tensor) -> Tensor:
        """Numbers of each row, from its owner, on every rank: [m, ...], of the held rows, -> [n, ...]. Collective."""
        own = self.owners(batch)[batch.held] == self.model.layout.data_rank
        return gather_rows(of_held[own], batch.held[own], len(batch), self.model.layout)

    def gap_to_engine(self, batch: Batch, logprobs: Tensor) -> tuple[float, float]:
        """Mean and maximum of |log pi - engine log-probability| over all tokens, for `logprobs` [T]. Collective.

        Sums of rows are added in double precision in the order of the rows, so the layout does not matter.
        """
        table = self.gaps_by_row(batch, logprobs)
        return mean_gap(table), float(table[:, 1].max()) if len(table) else 0.0

    def gaps_by_row(self, batch: Batch, logprobs: Tensor, counted: Tensor | None = None) -> Tensor:
        """Sum, maximum and number of |log pi - engine log-probability| of each row: float64 [n, 3]. Collective.

        `counted`: bool [T], the tokens that count; None: all.
        """
        sizes = batch.held_responses.tolist()
        gaps = (logprobs - batch.engine_logprobs).abs().double()
        counts = torch.ones_like(gaps, dtype=torch.bool) if counted is None else counted
        gaps = gaps.masked_fill(~counts, 0.0)  # even if it is NaN
        rows = zip(gaps.split(sizes), counts.split(sizes), strict=True)
        by_row = [torch.stack([gap.sum(), gap.max(), of.sum().double()]) for gap, of in rows]
        return self.gather(batch, torch.stack(by_row) if by_row else torch.zeros(0, 3, dtype=torch.float64))

    def update(
        self,
        batch: Batch,
        experience: Experience,
        baseline: Baseline,
        config: ActorUpdateConfig,
        order: list[Tensor],
        iteration: int = 0,
    ) -> dict[str, float]:
        """Take one optimizer step on `policy_loss` for each mini-batch of rows in `order` (int64 each).

        `experience`: on the CPU, rewards of all rows and the rest of the held rows. `iteration`: the run's, from 1; 0
        outside a run. Returns metrics over all steps that were not skipped. Raises NotFiniteError.
        """
        assert isinstance(self.model, TrainedModel)
        assert self.guard is not None
        moments = self._moments(batch, experience, baseline) if config.whiten_advantages else None
        experience = replace(experience, moments=moments)

        def loss(micro: MicroBatch, output: Tensor) -> tuple[Tensor, Tensor]:
            logprobs, entropy = output
            given = _of_micro_batch(experience, micro)
            return self.kernels.policy_loss(logprobs, entropy, given, micro.response_rows, baseline, config)

        def given() -> LossInputs:
            return _loss_inputs(batch, experience, baseline)

        owners, metrics = self.owners(batch), len(ROW_METRICS)
        steps = run_mini_batches(
            self.model, self.guard, batch, owners, order, loss, metrics, config.optimizer, given, iteration
        )
        summary = _summary(steps, batch.response_lengths[steps.rows]) if len(steps.rows) else {}
        routing = {f"actor/{name}": number for name, number in steps.routing.items()}
        return summary | routing | {"actor/skipped": float(steps.skipped)}

    def _moments(self, batch: Batch, experience: Experience, baseline: Baseline) -> Tensor:
        """The moments of all advantages of the batch. Each data-parallel rank computes those of its share."""
        layout, device = self.model.layout, self.model.device
        longest_first = torch.argsort(batch.response_lengths, descending=True, stable=True)
        mine = longest_first[self.owners(batch)[longest_first] == layout.data_rank]
        values = experience.values[value_cells(batch, mine)].to(device)
        rows = Rows.of(batch.response_lengths[mine], device)
        rewards, ranks = experience.rewards[mine].to(device), layout.groups.dp
        return self.kernels.advantage_moments(values, rewards, rows, baseline, ranks)


def mean_gap(table: Tensor) -> float:
    """The mean over all tokens that count, of some rows of `Actor.gaps_by_row`."""
    return float(table[:, 0].sum()) / max(int(table[:, 2].sum()), 1)


def _of_micro_batch(experience: Experience, micro: MicroBatch) -> Experience:
    """The experience of a micro-batch's rows, on its device."""

    def pick(flat: Tensor | None, cells: Tensor) -> Tensor | None:
        return None if flat is None else flat[cells].to(micro.tokens.device)

    tokens = micro.response_cells
    return Experience(
        old_logprobs=experience.old_logprobs[tokens].to(micro.tokens.device),
        values=experience.values[micro.value_cells].to(micro.tokens.device),
        rewards=experience.rewards[micro.rows].to(micro.tokens.device),
        weights=pick(experience.weights, tokens),
        reference_logprobs=pick(experience.reference_logprobs, tokens),
        moments=experience.moments,
    )


def _loss_inputs(batch: Batch, experience: Experience, baseline: Baseline) -> LossInputs:
    """The inputs of the loss, to be written to disk for the analysis of a skipped step."""
    rows = Rows.of(batch.held_responses, batch.held.device)
    by_token = {
        "old_logprobs": experience.old_logprobs,
        "reference_logprobs": experience.reference_logprobs,
        "correction_weights": experience.weights,
        "advantages": token_advantages(experience.values, experience.rewards[batch.held], rows, baseline),
    }
    given = {name: flat for name, flat in by_token.items() if flat is not None}
    return LossInputs({"rewards": experience.rewards}, given, {"values": experience.values})


def _summary(steps: Steps, lengths: Tensor) -> dict[str, float]:
    """Metrics from the rows of all steps. `lengths`: int64 [rows]. Advantages are averaged over tokens."""
    table = dict(zip(ROW_METRICS, steps.metrics.unbind(1), strict=True))
    share = lengths / lengths.sum()
    advantage, square = (float(table.pop(name).double() @ share.double()) for name in ("advantage", "advantage_square"))
    count = int(lengths.sum())
    variance = max(0.0, square - advantage**2) * count / max(count - 1, 1)
    least, greatest = table.pop("token_ratio_min"), table.pop("token_ratio_max")
    return {
        **{f"actor/{name}": float(column.mean()) for name, column in table.items()},
        "actor/clip_fraction": float((table["clip_high"] + table["clip_low"]).mean()),
        "actor/ratio_min": float(table["ratio"].min()),
        "actor/ratio_max": float(table["ratio"].max()),
        "actor/token_ratio_min": float(least.min()),
        "actor/token_ratio_max": float(greatest.max()),
        "actor/grad_norm": sum(steps.grad_norms) / len(steps.grad_norms),
        "advantage/mean": advantage,
        "advantage/std": variance**0.5,
    }
