"""Which rank computes which rows: each mini-batch in balance, alike on every rank, before any token has moved."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_tempo.config.method_settings import NEEDS, Method, Prompts
from megatron_tempo.config.stages import StageConfig, settings_of
from megatron_tempo.methods import METHODS
from megatron_tempo.methods.learner import Learner, Rollouts
from megatron_tempo.models.packing import row_owners
from megatron_tempo.training.row_owners import RowOwners
from megatron_tempo.types import Batch
from tests.support.tiny import held_by, one_version, ragged_batch

SEED = "7/stage2/3"


def model(data: int, data_rank: int = 0) -> Any:
    """What a model says of itself; a row's work is its length."""

    def divided(batch: Batch, order: Any = ()) -> Tensor:
        return row_owners(batch.lengths, order, data)

    layout = SimpleNamespace(data=data, data_rank=data_rank)
    return SimpleNamespace(model=SimpleNamespace(layout=layout), divided=divided, shares_replicas=True)


def owners_of(actor: int, critic: int | None, rank: int = 0) -> RowOwners:
    if critic is None:
        return RowOwners(model(actor, rank % actor), None)
    of_critic = model(critic, rank % critic)
    of_critic.shares_replicas = actor == critic
    return RowOwners(model(actor, rank % actor), of_critic)


def stage_of(method: Method, **changes: Any) -> StageConfig:
    stage = StageConfig(settings_of(method), labelled_prompts=12, unlabelled_prompts=16, responses_per_prompt=4)
    stage.actor.mini_batch_prompts, stage.critic.mini_batch_prompts = 4, 3
    stage.critic.drop_uniform_groups = True
    for name, value in changes.items():
        setattr(stage if hasattr(stage, name) else stage.settings, name, value)
    return stage


def columns(method: Method) -> Rollouts:
    """Labelled and unlabelled rows of many lengths, as they are when no token has moved."""
    labelled, unlabelled = ragged_batch(48, seed=1, per_prompt=4), ragged_batch(64, seed=2, per_prompt=4, correct=False)
    classes = torch.randint(-1, 3, (64,), generator=torch.Generator().manual_seed(0))
    unlabelled = replace(unlabelled, answer_class=classes if NEEDS[method].classes else None)
    none = torch.zeros(0, dtype=torch.int64)
    needed = stage_of(method).prompts()
    made = {Prompts.labelled: held_by(labelled, none), Prompts.unlabelled: held_by(unlabelled, none)}
    given = {kind: made[kind] if kind in needed else None for kind in made}
    return Rollouts(given[Prompts.labelled], given[Prompts.unlabelled])


class Recording:
    """Actor and critic that note the mini-batches of their updates, by owner: tokens of each data-parallel rank."""

    def __init__(self, data: int) -> None:
        self.data, self.loads = data, {"actor": [], "critic": []}

    def note(self, name: str, batch: Batch, owners: Tensor, order: list[Tensor]) -> None:
        tokens = [[int(batch.lengths[rows][owners[rows] == rank].sum()) for rank in range(self.data)] for rows in order]
        self.loads[name] += tokens

    def learner(self) -> Learner:
        recording = self

        class Of:
            def logprobs(self, batch: Batch) -> Tensor:
                return batch.engine_logprobs

            def entropies(self, batch: Batch) -> Tensor:
                return torch.zeros(len(batch.response_tokens))

            self_certainty = entropies

            def values(self, batch: Batch) -> Tensor:
                return torch.zeros(len(batch.response_tokens) + len(batch.held))

            def gather(self, batch: Batch, of_held: Tensor) -> Tensor:
                return torch.zeros(len(batch), *of_held.shape[1:])

            def routing_agreement(self) -> None:
                return None

            def gap_to_engine(self, *_: object) -> tuple[float, float]:
                return 0.0, 0.0

        class Actor(Of):
            def update(self, batch: Batch, experience: Any, baseline: Any, config: Any, order: Any, _: int) -> Any:
                assert batch.owners is not None
                recording.note("actor", batch, batch.owners.actor, order)
                return {}

        class Critic(Of):
            def update(self, batch: Batch, targets: Any, config: Any, order: Any, _: int) -> Any:
                assert batch.owners is not None
                recording.note("critic", batch, batch.owners.critic, order)
                return {}

        actor, critic = Actor(), Critic()
        given: Any = (actor, critic, actor.logprobs, lambda _: nullcontext())
        return Learner(*given, seed=SEED, iteration=1, max_response_tokens=100)


@pytest.mark.parametrize(
    ("method", "changes"),
    [*((method, {}) for method in Method), (Method.tempo, {"actor_on_labelled": True}),
     (Method.ttrl, {"responses_per_prompt": 3, "vote_responses": 4}), (Method.empo, {"entropy_low": 0.7}),
     (Method.ttrl_guard, {"responses_per_prompt": 3, "vote_responses": 4}),
     (Method.scrl, {"responses_per_prompt": 3, "vote_responses": 4})],
)  # fmt: skip
def test_each_mini_batch_of_each_method_is_balanced(method: Method, changes: dict[str, Any]) -> None:
    """The method's own calls tell which mini-batches it makes: the division must know them before."""
    stage, data = stage_of(method, **changes), 3
    stage.actor.epochs = stage.critic.epochs = 1
    rollouts = owners_of(data, data).of_iteration(columns(method), stage, 3, SEED)
    recording = Recording(data)
    METHODS[method](recording.learner(), rollouts, stage, 3)
    assert len(recording.loads["actor"]) >= 2
    assert bool(recording.loads["critic"]) == (NEEDS[method].critic is not None)
    longest = max(int(batch.lengths.max()) for batch in (rollouts.labelled, rollouts.unlabelled) if batch is not None)
    for loads in [*recording.loads["actor"], *recording.loads["critic"]]:
        assert max(loads) - min(loads) <= longest / 2, loads  # a division of other rows gives more than this


def test_the_rows_of_a_rank_are_those_that_either_model_computes_there() -> None:
    """PPO trains both on the same rows, in mini-batches of their own. Actor and critic have two and three replicas."""
    stage, given = stage_of(Method.ppo), columns(Method.ppo)
    found = []
    for rank in range(6):
        of_rank = owners_of(2, 3, rank)
        batch = of_rank.of_iteration(given, stage, 0, SEED).labelled
        assert batch is not None
        assert batch.owners is not None
        held = of_rank.held(batch)
        wanted = (batch.owners.actor == rank % 2) | (batch.owners.critic == rank % 3)
        assert held.tolist() == wanted.nonzero().flatten().tolist()
        assert len(batch.response_tokens) == 0, "no token was needed"
        found.append((batch.owners.actor.tolist(), batch.owners.critic.tolist()))
    assert all(one == found[0] for one in found), "the same on every rank"


def test_a_batch_that_one_model_is_trained_on_has_one_division_if_replicas_are_shared() -> None:
    rollouts = owners_of(2, 2).of_iteration(columns(Method.tempo), stage_of(Method.tempo), 0, SEED)
    for batch in (rollouts.labelled, rollouts.unlabelled):
        assert batch is not None
        assert batch.owners is not None
        assert torch.equal(batch.owners.actor, batch.owners.critic)
        assert set(batch.owners.actor.tolist()) == {0, 1}
    other = owners_of(2, 3).of_iteration(columns(Method.tempo), stage_of(Method.tempo), 0, SEED)
    assert other.unlabelled is not None
    assert other.unlabelled.owners is not None
    assert set(other.unlabelled.owners.critic.tolist()) == {0, 1, 2}


def test_without_an_actor_or_a_critic_nobody_holds_its_rows() -> None:
    batch = replace(ragged_batch(4), versions=one_version(ragged_batch(4).response_lengths))
    alone = RowOwners(None, None)
    assert alone.held(alone.of_batch(batch)).tolist() == []
    critic = RowOwners(None, model(2, 1))
    owned = critic.of_batch(batch)
    assert owned.owners is not None
    assert critic.held(owned).tolist() == (owned.owners.critic == 1).nonzero().flatten().tolist()
