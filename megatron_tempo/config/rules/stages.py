"""Rules on the stages: what each method needs, and how its batches divide."""

from __future__ import annotations

import math
from collections.abc import Iterator

from megatron_tempo.config.choices import Verifier
from megatron_tempo.config.method_settings import (
    Baseline,
    EmpoSettings,
    EntropyMinSettings,
    GroupSettings,
    Method,
    Prompts,
    ScrlSettings,
    TempoSettings,
)
from megatron_tempo.config.problem import Problem
from megatron_tempo.config.rules.layout import divisors, laid_of
from megatron_tempo.config.schema import Config
from megatron_tempo.config.stages import StageConfig
from megatron_tempo.config.truncation import TruncatedResponses
from megatron_tempo.config.updates import KlReference


def check(config: Config) -> Iterator[Problem]:
    active = {name: stage for name, stage in config.stages().items() if stage.iterations > 0}
    if not active:
        fix = "stage1.iterations=1 or more, or stage2.iterations=1 or more; to evaluate only, use eval"
        yield Problem("stage2.iterations", config.stage2.iterations, "no stage has iterations to train", fix)
    yield from _sets(config, active)
    yield from _critic(config, active)
    for name, stage in active.items():
        yield from _counts(name, stage)
        yield from _groups(name, stage)
        yield from _entropy_min(name, stage)
        yield from _advantages(name, stage)
        yield from _refill(name, stage, replays=config.rollout.replay is not None)
        yield from _truncation(name, stage, config.rollout.max_response_tokens)
        for update, batch, prompts in _updates(stage):
            total = stage.count(prompts)
            if batch > 0 and total > 0 and total % batch:
                field = f"{name}.{update}.mini_batch_prompts"
                fix = f"{field}=one of {_near(divisors(total), batch)}"
                yield Problem(field, batch, f"does not divide the {total} prompts of its update", fix)


def check_data_parallel(config: Config, world_size: int | None) -> Iterator[Problem]:
    """The rows of every mini-batch must divide evenly among the replicas of its model."""
    for name, stage in config.stages().items():
        for update, batch, prompts in _updates(stage) if stage.iterations > 0 else ():
            replicas = laid_of(config, update).replicas(world_size)
            rows = batch * stage.responses_per_prompt
            if replicas is not None and rows % replicas:
                wrong = f"its {rows} responses cannot be shared evenly by {replicas} data-parallel replicas"
                field = f"{name}.{update}.mini_batch_prompts"
                fix = _shared_evenly(
                    field, batch, stage.count(prompts), f"{name}.responses_per_prompt", stage, replicas
                )
                yield Problem(field, batch, wrong, fix)


def _shared_evenly(field: str, batch: int, total: int, each: str, stage: StageConfig, replicas: int) -> str:
    """The fix: mini-batches that divide evenly among the replicas, or numbers of responses with which `batch` does."""
    responses = stage.responses_per_prompt
    sizes = [size for size in divisors(total) if size * responses % replicas == 0]
    step = replicas // math.gcd(max(1, batch), replicas)
    fixes = [f"{field}=one of {_near(sizes, batch)}"] if sizes else []
    return f"{each}={-(-responses // step) * step}" + "".join(f", or {fix}" for fix in fixes)


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
            fix = f"{field}.path=FILE (.jsonl or .parquet)"
            if len(users) < len(active):  # otherwise nothing would be trained
                fix += f", or {' and '.join(f'{name}.iterations=0' for name in users)}"
            yield Problem(field, None, wrong, fix)
    unlabelled = config.data.unlabelled
    if unlabelled is not None and unlabelled.verifier is None:
        for name, stage in active.items():
            if stage.needs.classes:
                wrong = f"{name}.method={stage.method.name} compares a question's responses, and nothing says how"
                fix = f"data.unlabelled.verifier=one of {', '.join(Verifier.__members__)}"
                yield Problem("data.unlabelled.verifier", None, wrong, fix)


def _critic(config: Config, active: dict[str, StageConfig]) -> Iterator[Problem]:
    """A critic that is used must be trained: by an earlier stage, by this one, or before the run."""
    trained = config.model.critic_path is not None
    for name, stage in active.items():
        trained = trained or stage.trains_critic
        if stage.has_critic and not trained:
            wrong = f"{name} never trains its critic (estep_every=0), no stage before it does, and none is loaded"
            earlier = "stage1.iterations=1 or more, or " if name != "stage1" and config.stage1.trains_critic else ""
            fix = f"model.critic_path=FOLDER, or {earlier}{name}.estep_every=1"
            yield Problem("model.critic_path", None, wrong, fix)
        yield from _warmup(name, stage)


def _warmup(name: str, stage: StageConfig) -> Iterator[Problem]:
    field, warmup = f"{name}.critic.warmup_iterations", stage.critic.warmup_iterations
    if warmup > 0 and not stage.trains_critic:
        why = "estep_every=0" if stage.has_critic else f"method {stage.method.name} has none"
        wrong = f"{name} never trains a critic ({why}): these iterations would do nothing"
        yield Problem(field, warmup, wrong, f"{field}=0")
    elif warmup >= stage.iterations:
        wrong = f"the actor would never be updated in the stage's {stage.iterations} iterations"
        fix = f"{field} below {stage.iterations}, or {name}.iterations above {warmup}"
        yield Problem(field, warmup, wrong, fix)


def _groups(name: str, stage: StageConfig) -> Iterator[Problem]:
    """The rules of methods that compare the responses of a prompt group."""
    settings = stage.method_settings
    responses, vote = stage.responses_per_prompt, settings.vote_responses
    if isinstance(settings, GroupSettings) and responses == 1 and isinstance(stage.method, Method):
        field, method = f"{name}.responses_per_prompt", stage.method.name
        wrong = f"method {method} compares a prompt's responses with one another: a single one has no learning signal"
        yield Problem(field, responses, wrong, f"{field}=2 or more")
    if vote is not None and 0 < vote < responses:
        field = f"{name}.vote_responses"
        wrong = f"{name}.responses_per_prompt={responses} of them are trained on"
        yield Problem(field, vote, wrong, f"{field}={responses} or more, or null")
    if isinstance(settings, ScrlSettings):
        yield from _scrl(name, stage, settings)
    if not isinstance(settings, EmpoSettings):
        return
    low, high = settings.entropy_low, settings.entropy_high
    if low is not None and high is not None and low >= high:
        field = f"{name}.entropy_high"
        fix = f"{field} above {low}, or {name}.entropy_low=null"
        yield Problem(field, high, f"no entropy lies between {name}.entropy_low={low} and it", fix)


def _scrl(name: str, stage: StageConfig, settings: ScrlSettings) -> Iterator[Problem]:
    """The rules of SCRL's labels. Shares and counts that are out of their bounds are reported elsewhere."""
    field, rare, least = f"{name}.negative_share", settings.negative_share, settings.positive_share
    if 0 < least < rare <= 1:
        wrong = f"an answer with a share between {name}.positive_share={least} and it could be right and wrong"
        yield Problem(field, rare, wrong, f"{field}={least} or less")
    elif 0 < rare <= 1 and stage.samples >= stage.responses_per_prompt > 1 and stage.samples * rare <= 1:
        wrong = f"no answer is rare: of {stage.samples} responses that vote, one has a share of 1/{stage.samples}"
        fix = f"{name}.vote_responses={math.floor(1 / rare) + 1} or more, or {field}=0"
        yield Problem(field, rare, wrong, fix)


def _entropy_min(name: str, stage: StageConfig) -> Iterator[Problem]:
    """Entropy minimisation has neither rewards nor advantages, and its loss is the entropy term."""
    if not isinstance(stage.method_settings, EntropyMinSettings):
        return
    if stage.actor.entropy_coef > 0:  # others are reported as numbers
        field = f"{name}.actor.entropy_coef"
        wrong = "method entropy_min minimises the entropy, and a bonus would raise it"
        yield Problem(field, stage.actor.entropy_coef, wrong, f"{field}=0")
    if stage.actor.whiten_advantages:
        field = f"{name}.actor.whiten_advantages"
        yield Problem(field, True, "method entropy_min has no advantages", f"{field}=false")
    if stage.truncated_responses is TruncatedResponses.penalised:
        field = f"{name}.truncated_responses"
        fix = f"{field}=masked and {name}.length_penalty_tokens=null"
        wrong = "method entropy_min has no rewards to add a penalty to"
        yield Problem(field, stage.truncated_responses.name, wrong, fix)


def _advantages(name: str, stage: StageConfig) -> Iterator[Problem]:
    """The rules of the fields that change a critic's advantages, its E-steps, or the entropy bonus."""
    settings, responses = stage.method_settings, stage.responses_per_prompt
    if settings.pass_at_k > max(1, responses):
        field = f"{name}.pass_at_k"
        wrong = f"an iteration has {responses} responses to a prompt ({name}.responses_per_prompt)"
        fix = f"{field}={max(1, responses)}, or {name}.responses_per_prompt={settings.pass_at_k}"
        yield Problem(field, settings.pass_at_k, wrong, fix)
    if 0 <= settings.gae_lambda < 1 and settings.baseline is Baseline.paper:
        field = f"{name}.gae_lambda"
        wrong = f"lambda-returns need the value before a token, and {name}.baseline=paper reads the one after it"
        yield Problem(field, settings.gae_lambda, wrong, f"{name}.baseline=before_token, or {field}=1")
    if settings.estep_when_ece_above is not None and settings.estep_every == 0:
        field = f"{name}.estep_when_ece_above"
        wrong = f"{name}.estep_every=0 never has an E-step"
        yield Problem(field, settings.estep_when_ece_above, wrong, f"{field}=null, or {name}.estep_every=1")
    if isinstance(settings, TempoSettings) and settings.pessimism > 0 and settings.estep_every == 0:
        field = f"{name}.pessimism"
        wrong = f"{name}.estep_every=0 never has an E-step, before and after which the values would differ"
        yield Problem(field, settings.pessimism, wrong, f"{field}=0, or {name}.estep_every=1")
    reference = stage.actor.kl_reference
    if reference is not KlReference.model and stage.actor.kl_coef == 0:
        field, coef = f"{name}.actor.kl_reference", f"{name}.actor.kl_coef"
        wrong = f"there is no KL term to hold the policy to it ({coef}=0)"
        yield Problem(field, reference.name, wrong, f"{field}=model, or {coef}=0.01")
    target = stage.actor.entropy_target
    if target is not None and target > 0 and stage.actor.entropy_coef == 0:
        field, coef = f"{name}.actor.entropy_target", f"{name}.actor.entropy_coef"
        wrong = f"there is no entropy bonus to reach it with ({coef}=0)"
        yield Problem(field, target, wrong, f"{field}=null, or {coef}=0.01")


def _refill(name: str, stage: StageConfig, *, replays: bool) -> Iterator[Problem]:
    field, limit = f"{name}.refill_limit", stage.refill_limit
    if limit is None or limit < 1:  # the latter is reported as a number
        return
    if stage.refilled is None:
        wrong = f"method {stage.method.name} does not compare the responses of a prompt"
        yield Problem(field, limit, wrong, f"{field}=null, or {name}.method=grpo, ttrl or empo")
        return
    count = stage.count({stage.refilled})
    if limit <= count:
        wrong = f"an iteration asks for {count} {stage.refilled.name} prompts already"
        yield Problem(field, limit, wrong, f"{field}={3 * max(1, count)}, or {field}=null")
    if stage.samples == 1:
        wrong = "one response to a prompt always agrees with itself, so each prompt would be thrown away"
        yield Problem(field, limit, wrong, f"{field}=null, or {name}.responses_per_prompt=8")
    if replays:
        yield Problem(field, limit, "a replay generates nothing", f"{field}=null")


def _truncation(name: str, stage: StageConfig, limit: int) -> Iterator[Problem]:
    field, interval = f"{name}.length_penalty_tokens", stage.length_penalty_tokens
    some = f"{field}={max(1, limit // 5)}"
    if stage.truncated_responses is not TruncatedResponses.penalised:
        if interval is not None:
            fix = f"{name}.truncated_responses=penalised, or {field}=null"
            yield Problem(field, interval, "there is no length penalty", fix)
        if stage.length_penalty > 0 and stage.length_penalty != 1:  # others are reported as numbers
            factor = f"{name}.length_penalty"
            fix = f"{name}.truncated_responses=penalised and {some}, or {factor}=1"
            yield Problem(factor, stage.length_penalty, "there is no length penalty", fix)
    elif interval is None:
        yield Problem(field, None, f"nothing says where below {limit} tokens the penalty begins", some)
    elif interval > limit:
        wrong = f"no response has more than rollout.max_response_tokens={limit} tokens"
        yield Problem(field, interval, wrong, some)


def _counts(name: str, stage: StageConfig) -> Iterator[Problem]:
    needs = stage.needs
    for kind in Prompts:
        field, count = f"{name}.{kind.name}_prompts", stage.count({kind})
        if kind in stage.prompts() and count == 0:
            yield Problem(field, count, f"method {stage.method.name} needs {kind.name} prompts", f"{field}=1 or more")
        elif kind not in {needs.actor, needs.critic, *stage.actor_prompts()} and count > 0:
            yield Problem(field, count, f"method {stage.method.name} uses no {kind.name} prompts", f"{field}=0")


def _near(options: list[int], value: int) -> str:
    """The five options nearest to `value`, ascending."""
    return ", ".join(map(str, sorted(sorted(options, key=lambda option: abs(option - value))[:5])))
