"""Which ranks compute which rows of a batch, decided before its tokens move."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megatron_tempo.config.method_settings import Prompts
from megatron_tempo.config.stages import StageConfig
from megatron_tempo.methods import actor_order, critic_order
from megatron_tempo.methods.learner import Rollouts
from megatron_tempo.models.actor import Actor
from megatron_tempo.models.critic import Critic
from megatron_tempo.types import Batch, Owners


@dataclass(frozen=True, slots=True)
class RowOwners:
    """Divides the rows of batches over the data-parallel ranks of actor and critic.

    A model's mini-batches, of the first epoch, are each divided by work, so that its ranks finish a step together. A
    batch that a model is not trained on is divided as a whole; if both models have the same replicas, as for the other
    model. Only the columns of a batch are read. The division is the same on every rank.
    """

    actor: Actor | None  # None: an evaluation
    critic: Critic | None

    @property
    def layers(self) -> Tensor:
        """The layers whose recorded experts this rank needs: int64, those of its part of the actor."""
        return torch.tensor([] if self.actor is None else self.actor.layers, dtype=torch.int64)

    def of_iteration(self, rollouts: Rollouts, stage: StageConfig, iteration: int, seed: str) -> Rollouts:
        """The rollouts of a stage's iteration, from 0, with owners. `seed`: as the learner's."""
        by_actor = self._of_actor(rollouts, stage, seed) if not stage.warms_up(iteration) else {}
        by_critic: dict[Prompts, Tensor] = {}
        if self.critic is not None and stage.critic_learns(iteration):
            for kind in stage.critic_prompts():
                if (batch := _of_kind(rollouts, kind)) is not None:
                    by_critic[kind] = self.critic.divided(batch, critic_order(batch, stage, seed))
        owned = {
            kind: self._owned(batch, by_actor.get(kind), by_critic.get(kind))
            for kind in Prompts
            if (batch := _of_kind(rollouts, kind)) is not None
        }
        return Rollouts(owned.get(Prompts.labelled), owned.get(Prompts.unlabelled))

    def of_batch(self, batch: Batch) -> Batch:
        """A batch that no model is trained on, with owners."""
        return self._owned(batch, None, None)

    def held(self, batch: Batch) -> Tensor:
        """The rows of the batch, which has owners, that this rank's actor or critic computes: int64, ascending."""
        assert batch.owners is not None
        mine = torch.zeros(len(batch), dtype=torch.bool)
        for model, owners in ((self.actor, batch.owners.actor), (self.critic, batch.owners.critic)):
            if model is not None:
                mine |= owners == model.model.layout.data_rank
        return mine.nonzero().flatten()

    def _of_actor(self, rollouts: Rollouts, stage: StageConfig, seed: str) -> dict[Prompts, Tensor]:
        """The owners in the actor's layout of the rows that it is trained on, by the kind of prompts."""
        assert self.actor is not None
        kinds = [kind for kind in (Prompts.unlabelled, Prompts.labelled) if kind in stage.actor_prompts()]
        batches = {kind: batch for kind in kinds if (batch := _of_kind(rollouts, kind)) is not None}
        parts = list(batches.values())
        whole = parts[0] if len(parts) == 1 else Batch.join(*parts)
        owners = self.actor.divided(whole, actor_order(whole, stage, seed))
        return dict(zip(batches, owners.split([len(part) for part in parts]), strict=True))

    def _owned(self, batch: Batch, of_actor: Tensor | None, of_critic: Tensor | None) -> Batch:
        actor, critic = self.actor, self.critic
        if of_critic is None and critic is not None:
            shared = of_actor is not None and critic.shares_replicas
            of_critic = of_actor if shared else critic.divided(batch)
        if of_actor is None and actor is not None:
            shared = of_critic is not None and critic is not None and critic.shares_replicas
            of_actor = of_critic if shared else actor.divided(batch)
        none = torch.zeros(len(batch), dtype=torch.int64)  # of a model that is not there: nobody reads it
        return replace(
            batch, owners=Owners(none if of_actor is None else of_actor, none if of_critic is None else of_critic)
        )


def _of_kind(rollouts: Rollouts, kind: Prompts) -> Batch | None:
    return rollouts.labelled if kind is Prompts.labelled else rollouts.unlabelled
