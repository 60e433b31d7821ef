"""The distinct kinds of ranks of a layout, and one rank of each. Ranks of a kind do the same work on equal shapes."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_tempo.config.schema import Config, ParallelConfig


@dataclass(frozen=True, slots=True)
class RankKind:
    """One rank that stands for all ranks like it.

    >>> RankKind(rank=6, world=8, actor_stage=1, critic_stage=0, label="actor stage 2 of 2, critic stage 1 of 1")
    """

    rank: int
    world: int
    actor_stage: int
    critic_stage: int
    label: str


@dataclass(frozen=True, slots=True)
class _Position:
    """A rank's position in a layout. Megatron's order of ranks, from the innermost: tensor, context, data, pipeline."""

    context: int
    data: int
    stage: int

    @classmethod
    def of(cls, rank: int, world: int, own: ParallelConfig) -> _Position:
        data = world // own.ranks_of_a_replica
        rest = rank // own.tensor
        return cls(rest % own.context, rest // own.context % data, rest // own.context // data)


def kinds_of(config: Config, world: int, rows: int, layers: int) -> list[RankKind]:
    """One rank of each kind. `rows`: rows of a pass over all replicas, which decides whether their shares differ.
    `layers`: of either model.

    Ranks are alike if they have the same pipeline stages of actor and critic, unless these are middle stages, which are
    alike too if they have equally many layers; if they are the first or another context rank; and if their share of the
    rows has the same size. Tensor ranks do the same work, except that the first one reports: it stands for all of them.
    """
    actor, critic = config.parallel, config.parallel.of_critic()
    found: dict[tuple[object, ...], RankKind] = {}
    for rank in range(world):
        of_actor, of_critic = (_Position.of(rank, world, own) for own in (actor, critic))
        if rank % actor.tensor or (config.has_critic and rank % critic.tensor):
            continue
        key = (
            *_key(of_actor, world, actor, rows, layers),
            *(_key(of_critic, world, critic, rows, layers) if config.has_critic else ()),
        )
        if key not in found:
            label = ", ".join(_words(of_actor, of_critic, config, world, rows))
            found[key] = RankKind(rank, world, of_actor.stage, of_critic.stage, label)
    return list(found.values())


def _key(at: _Position, world: int, own: ParallelConfig, rows: int, layers: int) -> tuple[object, ...]:
    count = own.pipeline_layers.counts(layers)[at.stage]
    return (_stage_kind(at.stage, own.pipeline), count, min(at.context, 1), _has_more_rows(at, world, own, rows))


def _stage_kind(stage: int, pipeline: int) -> str:
    return "first" if stage == 0 else "last" if stage == pipeline - 1 else "middle"


def _has_more_rows(at: _Position, world: int, own: ParallelConfig, rows: int) -> bool:
    """Whether the rank is one of those that get a row more than the others."""
    return at.data < rows % (world // own.ranks_of_a_replica)


def _words(of_actor: _Position, of_critic: _Position, config: Config, world: int, rows: int) -> list[str]:
    actor, critic = config.parallel, config.parallel.of_critic()
    pairs = [("actor ", of_actor, actor), ("critic ", of_critic, critic)]
    if not config.has_critic or actor == critic:
        pairs = [("", of_actor, actor)]
    staged = [pair for pair in pairs if pair[2].pipeline > 1 or len(pairs) > 1]
    words = [f"{name}stage {at.stage + 1} of {own.pipeline}" for name, at, own in staged]
    if actor.context > 1:
        words.append(f"context rank {of_actor.context}")
    if rows % (world // actor.ranks_of_a_replica):
        words.append("with a row more" if _has_more_rows(of_actor, world, actor, rows) else "with a row less")
    return words or ["every rank"]
