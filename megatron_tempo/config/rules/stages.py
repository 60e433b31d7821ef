"""Rules on the stages: what each method needs, and how its batches divide."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_tempo.config.problem import Problem, show
from megatron_tempo.config.rules.layout import divisors, laid_of
from megatron_tempo.config.schema import NEEDS, Config, Prompts, StageConfig


def check(config: Config) -> Iterator[Problem]:
    active = {name: stage for name, stage in config.stages().items() if stage.iterations > 0}
    if not active:
        fix = "stage1.iterations or stage2.iterations=1 or more; to evaluate only, use eval"
        yield Problem("stage2.iterations", config.stage2.iterations, "no stage has iterations to train", fix)
    yield from _sets(config, active)
    yield from _critic(config, active)
    for name, stage in active.items():
        yield from _unused(name, stage)
        yield from _counts(name, stage)
        for update, batch, prompts in _updates(stage):
            total = stage.count(prompts)
            if batch > 0 and total > 0 and total % batch:
                field = f"{name}.{update}.mini_batch_prompts"
                fix = f"{field}=one of {_near(divisors(total), batch)}"
                yield Problem(field, batch, f"does not divide the {total} prompts of its update", fix)


def check_data_parallel(config: Config, world_size: int | None) -> Iterator[Problem]:
    """The rows of every mini-batch are shared evenly among the replicas of its model."""
    for name, stage in config.stages().items():
        for update, batch, _ in _updates(stage) if stage.iterations > 0 else ():
            laid = laid_of(config, update)
            replicas = laid.replicas(world_size)
            rows = batch * stage.responses_per_prompt
            if replicas is not None and rows % replicas:
                wrong = f"its {rows} responses cannot be shared evenly by {replicas} data-parallel replicas"
                field = f"{name}.{update}.mini_batch_prompts"
                raised = laid.fields["tensor"]
                fix = f"make {field} * {name}.responses_per_prompt a multiple of {replicas}, or raise {raised}"
                yield Problem(field, batch, wrong, fix)


def _updates(stage: StageConfig) -> Iterator[tuple[str, int, set[Prompts]]]:
    """Name, mini-batch and prompts of each update of an iteration."""
    yield "actor", stage.actor.mini_batch_prompts, stage.actor_prompts()
    if stage.trains_critic:
        yield "critic", stage.critic.mini_batch_prompts, stage.critic_prompts()


def _sets(config: Config, active: dict[str, StageConfig]) -> Iterator[Problem]:
    sets = {Prompts.labelled: config.data.labelled, Prompts.unlabelled: config.data.unlabelled}
    for kind, dataset in sets.items():
        users = [name for name, stage in active.items() if kind in stage.prompts()]
        if users and dataset is None:
            field = f"data.{kind.name}"
            wrong = f"{users[0]}.method={active[users[0]].method.name} needs {kind.name} questions"
            fix = f"{field}.path=FILE (.jsonl or .parquet), or {users[0]}.iterations=0"
            yield Problem(field, None, wrong, fix)


def _critic(config: Config, active: dict[str, StageConfig]) -> Iterator[Problem]:
    """A critic that judges must have been trained: by an earlier stage, by this one, or before the run."""
    trained = config.model.critic_path is not None
    for name, stage in active.items():
        trained = trained or stage.trains_critic
        if NEEDS[stage.method].critic is not None and not trained:
            wrong = f"{name} never trains its critic (estep_every=0), no stage before it does, and none is loaded"
            fix = f"model.critic_path=FOLDER, stage1.iterations=1 or more, or {name}.estep_every=1"
            yield Problem("model.critic_path", None, wrong, fix)
        yield from _warmup(name, stage)


def _warmup(name: str, stage: StageConfig) -> Iterator[Problem]:
    field, warmup = f"{name}.critic.warmup_iterations", stage.critic.warmup_iterations
    if warmup > 0 and not stage.trains_critic:
        wrong = f"{name} never trains its critic (estep_every=0): these iterations would do nothing"
        yield Problem(field, warmup, wrong, f"{field}=0")
    elif warmup >= stage.iterations:
        wrong = f"the actor would never be updated in the stage's {stage.iterations} iterations"
        fix = f"{field} below {stage.iterations}, or {name}.iterations above {warmup}"
        yield Problem(field, warmup, wrong, fix)


def _unused(name: str, stage: StageConfig) -> Iterator[Problem]:
    """Settings that have a meaning only beside an E-step, changed in a stage that has none."""
    if NEEDS[stage.method].estep:
        return
    default = StageConfig()
    for field in ("value_timing", "estep_every", "actor_on_labelled"):
        value, usual = getattr(stage, field), getattr(default, field)
        if value != usual:
            fix = f"remove it, or {name}.{field}={show(usual)}"
            yield Problem(f"{name}.{field}", value, f"method {stage.method.name} does not use it", fix)


def _counts(name: str, stage: StageConfig) -> Iterator[Problem]:
    needs = NEEDS[stage.method]
    for kind in Prompts:
        field, count = f"{name}.{kind.name}_prompts", stage.count({kind})
        if kind in stage.prompts() and count == 0:
            yield Problem(field, count, f"method {stage.method.name} needs {kind.name} prompts", f"{field}=1 or more")
        elif kind not in {needs.actor, needs.critic, *stage.actor_prompts()} and count > 0:
            yield Problem(field, count, f"method {stage.method.name} uses no {kind.name} prompts", f"{field}=0")


def _near(options: list[int], value: int) -> str:
    """The five options nearest to `value`, ascending."""
    return ", ".join(map(str, sorted(sorted(options, key=lambda option: abs(option - value))[:5])))
