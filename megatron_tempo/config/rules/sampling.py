"""Rules on sampling: temperature, top-p, top-k, min-p, stop strings and seeds, of rollouts and of evaluations."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_tempo.config.choices import EngineKind
from megatron_tempo.config.extensions import Extension, ExtensionError, load_engine
from megatron_tempo.config.problem import Problem
from megatron_tempo.config.sampled import evaluation_stop
from megatron_tempo.config.schema import Config, EvaluationConfig, RolloutConfig

STOPS, STOP_BYTES = 32, 64  # stop strings, and bytes of one: what SGLang takes
COOLEST, HOTTEST = 0.01, 2.0  # temperatures that servers keep: vLLM raises lower ones, and refuses higher ones
DETERMINISTIC = "--enable-deterministic-inference"

_Settings = RolloutConfig | EvaluationConfig


def check(config: Config, *, training: bool) -> Iterator[Problem]:
    """`training`: responses are generated to train on, not only to evaluate."""
    groups: dict[str, _Settings] = {"rollout": config.rollout} if training else {}
    for group, settings in (groups | {"evaluation": config.evaluation}).items():
        yield from _combined(group, settings)
        yield from _by_engine(config, group, settings)
    for group, stop in (("rollout", config.rollout.stop), ("evaluation", config.evaluation.stop or [])):
        yield from _stop(group, stop)
    yield from _equal_samples(config)
    if training:
        yield from _greedy_training(config)
        yield from _paused(config)
        yield from _reference(config)


def _truncated(settings: _Settings) -> dict[str, str]:
    """The settings that leave fewer tokens, with an override that switches each off."""
    off = {"top_p": "1", "top_k": "null", "min_p": "0"}
    return {name: off[name] for name in off if getattr(settings, name) not in (1.0, None, 0.0)}


def _fixed(group: str, names: dict[str, str]) -> str:
    return " and ".join(f"{group}.{name}={value}" for name, value in names.items())


def _combined(group: str, settings: _Settings) -> Iterator[Problem]:
    truncated = _truncated(settings)
    if not settings.temperature and truncated:
        name = next(iter(truncated))
        wrong = f"{group}.temperature=0 takes the most probable token, whatever {name} leaves"
        yield Problem(f"{group}.{name}", getattr(settings, name), wrong, _fixed(group, truncated))


def _greedy_training(config: Config) -> Iterator[Problem]:
    """All responses to a prompt would be the same, and their log-probabilities 0 whatever the weights are."""
    wrong = "with one choice for each token, responses to a prompt are all equal and have no gradient to train on"
    if not config.rollout.temperature:
        yield Problem("rollout.temperature", config.rollout.temperature, wrong, "rollout.temperature=1")
    elif config.rollout.top_k == 1:
        yield Problem("rollout.top_k", 1, wrong, "rollout.top_k=null")


def _equal_samples(config: Config) -> Iterator[Problem]:
    evaluation = config.evaluation
    name = "temperature" if not evaluation.temperature else "top_k" if evaluation.top_k == 1 else None
    if name is not None and evaluation.samples > 1 and evaluation.sets:
        count = evaluation.samples
        wrong = f"is greedy, so all {count} responses to a question are equal, and avg@{count} and pass@k say no more"
        fix = "evaluation.samples=1 and evaluation.pass_k=[1]"
        yield Problem(f"evaluation.{name}", getattr(evaluation, name), wrong, fix)


def _stop(group: str, strings: list[str]) -> Iterator[Problem]:
    field = f"{group}.stop"
    if "" in strings:
        yield Problem(field, strings, "has an empty string, which every text contains", f"{field}=[]")
    elif len(strings) > STOPS:
        yield Problem(field, strings, f"are {len(strings)} strings", f"give at most {STOPS}, or {field}=[]")
    elif long := [string for string in strings if len(string.encode(errors="replace")) > STOP_BYTES]:
        wrong = f"is longer than {STOP_BYTES} bytes, and an end of it does as well"
        yield Problem(field, long[0], wrong, f"give at most {STOP_BYTES} bytes, or {field}=[]")


def _paused(config: Config) -> Iterator[Problem]:
    """A server sees the tokens so far of a response that continues as its prompt. Only colocated ones are paused."""
    rollout = config.rollout
    if rollout.stop and rollout.partial_rollouts and rollout.is_served and rollout.is_colocated:
        wrong = "a server does not see a stop string that began before a response was paused"
        yield Problem("rollout.stop", rollout.stop, wrong, "rollout.stop=[], or rollout.partial_rollouts=false")


def _by_engine(config: Config, group: str, settings: _Settings) -> Iterator[Problem]:
    engine = config.rollout.engine
    if isinstance(engine, Extension):
        stop = settings.stop if group == "rollout" else evaluation_stop(config)
        yield from _imported(group, settings, stop or [], engine)
    elif engine.is_served:
        yield from _served(config, group, settings, engine)


def _served(config: Config, group: str, settings: _Settings, engine: EngineKind) -> Iterator[Problem]:
    temperature, field = settings.temperature, f"{group}.temperature"
    if 0 < temperature < COOLEST:
        wrong = f"is lower than servers sample at: vLLM would take {COOLEST}"
        yield Problem(
            field, temperature, wrong, f"{field}={COOLEST}" + (f", or {field}=0" if group != "rollout" else "")
        )
    elif temperature > HOTTEST and engine is EngineKind.vllm:
        yield Problem(field, temperature, f"vLLM refuses more than {HOTTEST:g}", f"{field}={HOTTEST:g}")
    arguments = config.rollout.servers.arguments
    if settings.seed is not None and engine is EngineKind.sglang and DETERMINISTIC not in arguments:
        wrong = f"SGLang uses seeds only with {DETERMINISTIC}, which costs speed and is not for a CPU"
        every = ",".join(f"'{word}'" for word in [*arguments, DETERMINISTIC])
        fix = f"{group}.seed=null, or rollout.servers.arguments=[{every}]"
        yield Problem(f"{group}.seed", settings.seed, wrong, fix)


def _imported(group: str, settings: _Settings, stop: list[str], engine: Extension) -> Iterator[Problem]:
    """A user's engine keeps the settings that it says it keeps."""
    try:
        kept = load_engine(engine).sampling
    except ExtensionError:
        return  # reported elsewhere
    asked = _truncated(settings)
    asked |= {"stop": "[]"} if stop else {}
    asked |= {"seed": "null"} if settings.seed is not None else {}
    for name in asked:
        if name not in kept:
            wrong = f"{engine} does not say that it keeps {name}"
            fix = f'{group}.{name}={asked[name]}, or "{name}" among its class\'s attribute sampling'
            yield Problem(f"{group}.{name}", stop if name == "stop" else getattr(settings, name), wrong, fix)
    if not settings.temperature and "greedy" not in kept:
        wrong = f"{engine} does not say that it can be greedy"
        fix = f'{group}.temperature=1, or "greedy" among its class\'s attribute sampling'
        yield Problem(f"{group}.temperature", 0, wrong, fix)


def _reference(config: Config) -> Iterator[Problem]:
    """The KL term compares two distributions over the same tokens."""
    truncated = _truncated(config.rollout)
    for name, stage in config.stages().items():
        if truncated and stage.iterations > 0 and stage.actor.kl_coef > 0:
            wrong = "the reference would leave other tokens than the actor, so no KL divergence comes of the two"
            field = f"{name}.actor.kl_coef"
            fix = f"{field}=0, or {_fixed('rollout', truncated)}"
            yield Problem(field, stage.actor.kl_coef, f"with rollout.{next(iter(truncated))}, {wrong}", fix)
