"""Rules on how an engine's workers share a mixture's experts: each cut over tensor ranks, or each on one of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from megatron_tempo.config.choices import EngineKind, EnginePrecision
from megatron_tempo.config.model_shape import Experts
from megatron_tempo.config.problem import Problem
from megatron_tempo.config.rules.layout import divisors
from megatron_tempo.config.schema import Config

_FP8_BLOCK = 128  # of the servers' FP8 weights
_ARGUMENTS, _TENSOR = "rollout.servers.arguments", "rollout.servers.tensor"
# vLLM 0.32 (`config/parallel.py`): with it each worker has some of the experts, whole.
_APART = ("--enable-expert-parallel", "-ep")
_MOVES = "--enable-eplb"
# SGLang 0.5.23 (`srt/arg_groups/fields/parallel.py`): into how many parts the experts are divided.
_PARTS = ("--ep-size", "--expert-parallel-size", "--ep")


def check(config: Config, experts: Experts | None) -> Iterator[Problem]:
    """`experts`: of the actor; None if it has none."""
    servers = config.rollout.servers
    if not config.rollout.is_served or servers.addresses is not None or servers.tensor < 1:
        return
    is_vllm, given = config.rollout.engine is EngineKind.vllm, servers.arguments
    apart = [word for word in given if word in _APART] if is_vllm else []
    if experts is None:
        if apart:
            wrong = f"vLLM refuses {apart[0]} for a model without a mixture of experts, as model.path is"
            yield Problem(_ARGUMENTS, given, wrong, f"{_ARGUMENTS}={_without(given, apart)}")
        return
    if is_vllm and _MOVES in given:
        wrong = f"{_MOVES} lets vLLM move experts between its workers, which a weight sync does not follow"
        yield Problem(_ARGUMENTS, given, wrong, f"{_ARGUMENTS}={_without(given, [_MOVES])}")
    parts = servers.tensor if apart else 1 if is_vllm else _parts(given)
    if apart:
        yield from _whole(servers.tensor, experts)
    elif parts is None or parts < 1 or servers.tensor % parts or experts.count % parts:
        yield _uneven(given, servers.tensor, experts)
        return
    yield from _cut(config, experts, parts or 1)


def _whole(tensor: int, experts: Experts) -> Iterator[Problem]:
    if tensor > experts.count:
        wrong = f"more workers than the {experts.count} experts, of which {_APART[0]} gives each worker some"
        yield Problem(_TENSOR, tensor, wrong, f"{_TENSOR}={experts.count} or less")


def _uneven(given: Sequence[str], tensor: int, experts: Experts) -> Problem:
    """SGLang's number of parts is none, or leaves a remainder."""
    fits = [n for n in divisors(tensor) if experts.count % n == 0]
    named = [word for word in given if word.partition("=")[0] in _PARTS]
    wrong = (
        f"{named[0].partition('=')[0]} has to be a number that divides {_TENSOR}={tensor} and the {experts.count} "
        "experts, written with ="
    )
    rest = [word for word in given if word not in named and not word.isdecimal()]
    return Problem(_ARGUMENTS, given, wrong, f"{_ARGUMENTS}={_written([*rest, f'--ep-size={max(fits)}'])}")


def _cut(config: Config, experts: Experts, parts: int) -> Iterator[Problem]:
    """Each expert is cut over the workers that share it; FP8 weights in whole blocks."""
    servers = config.rollout.servers
    block = _FP8_BLOCK if servers.precision is EnginePrecision.fp8 else 1
    if experts.ffn % (servers.tensor // parts * block) == 0:
        return
    fits = [n for n in divisors(experts.ffn) if experts.ffn % (n * block) == 0]
    blocks = f" in blocks of {block}" if block > 1 else ""
    wrong = f"does not divide the {experts.ffn} feed-forward units of an expert{blocks}"
    if not fits:
        yield Problem(_TENSOR, servers.tensor, wrong, "rollout.servers.precision=bf16")
        return
    fix = f"{_TENSOR}=one of {', '.join(str(n * parts) for n in fits)}"
    if config.rollout.engine is EngineKind.vllm and servers.tensor <= experts.count:
        fix += f"; or, with whole experts on each worker, {_ARGUMENTS}={_written([*servers.arguments, _APART[0]])}"
    yield Problem(_TENSOR, servers.tensor, wrong, fix)


def _parts(given: Sequence[str]) -> int | None:
    """SGLang's expert ranks, by its options; None if they are not a number."""
    values = [word.partition("=")[2] for word in given if word.partition("=")[0] in _PARTS]
    if not values:
        return 1
    return int(values[-1]) if values[-1].isdecimal() else None


def _without(given: Sequence[str], words: Sequence[str]) -> str:
    return _written([word for word in given if word not in words])


def _written(words: Sequence[str]) -> str:
    """A list in Hydra's grammar, in which a word with = needs quotes."""
    return "[" + ",".join(f"'{word}'" for word in words) + "]"
