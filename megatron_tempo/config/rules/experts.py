"""Rules on mixtures of experts: how ranks and servers share the experts, and fields that only such models have.

Megatron divides the ranks of a pipeline stage twice: into tensor x context x data for dense parameters, and into
expert_tensor x expert x the rest for experts (`initialize_model_parallel` of its parallel_state.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from megatron_tempo.config.model_shape import Experts, ModelShape
from megatron_tempo.config.problem import Problem
from megatron_tempo.config.rules import engine_experts
from megatron_tempo.config.rules.layout import Laid, divisors, folders_of, laid_of
from megatron_tempo.config.schema import Config


def check(config: Config, shapes: Mapping[str, ModelShape], world_size: int | None) -> Iterator[Problem]:
    """`shapes`: of the models that could be read, by field."""
    problems: list[Problem] = []
    for role, folder in folders_of(config).items():
        if folder not in shapes:
            continue
        laid, own = laid_of(config, role), shapes[folder].experts
        if own is None:
            problems += _dense(config, laid, folder, role)
        else:
            problems += [*_shares(laid, folder, own), *_processes(laid, own, world_size), *_sequence(laid)]
    yield from dict.fromkeys(problems)  # a critic with the actor's folder and layout has the same problems
    coefficient = config.model.router_aux_loss_coef
    if shapes and coefficient > 0 and all(shape.experts is None for shape in shapes.values()):
        wrong = f"{' and '.join(shapes)} has no mixture of experts whose load it could balance"
        yield Problem("model.router_aux_loss_coef", coefficient, wrong, "model.router_aux_loss_coef=0")
    if (actor := shapes.get("model.path")) is not None:
        yield from engine_experts.check(config, actor.experts)


def _dense(config: Config, laid: Laid, folder: str, role: str) -> Iterator[Problem]:
    """The layout of experts of a model that has none. A dense critic of an actor with experts needs its own."""
    parallel, wrong = laid.parallel, f"{folder} has no mixture of experts"
    place = "parallel" if role == "actor" else "parallel.critic"
    if role == "critic" and config.model.critic_path is None:
        return  # it has the actor's decoder, for which the same is reported
    if parallel.expert > 1:
        yield Problem(laid.fields["expert"], parallel.expert, wrong, f"{place}.expert=1")
    if parallel.expert_cut != parallel.tensor:
        field = laid.fields["expert_tensor"]
        yield Problem(field, parallel.expert_tensor, wrong, f"{place}.expert_tensor={parallel.tensor}")


def _shares(laid: Laid, folder: str, own: Experts) -> Iterator[Problem]:
    expert, cut = laid.parallel.expert, laid.parallel.expert_cut
    if expert > 0 and own.count % expert:
        fits = ", ".join(map(str, divisors(own.count)))
        wrong = f"does not divide the {own.count} experts of {folder}"
        yield Problem(laid.fields["expert"], expert, wrong, f"{laid.fields['expert']}=one of {fits}")
    if cut > 0 and own.ffn % cut:
        field = _cut_field(laid)
        fits = ", ".join(map(str, divisors(own.ffn)))
        wrong = f"does not divide the {own.ffn} feed-forward units of an expert of {folder}"
        yield Problem(laid.fields["expert_tensor"], laid.parallel.expert_tensor, wrong, f"{field}=one of {fits}")


def _cut_field(laid: Laid) -> str:
    """The field that may give the ranks of an expert another number: the critic's own if its tensor ranks are its own.

    Without a value it follows `tensor`, also where only the critic's `tensor` is given.
    """
    fields = laid.fields
    own = fields["tensor"] == "parallel.critic.tensor" and laid.parallel.expert_tensor is None
    return "parallel.critic.expert_tensor" if own else fields["expert_tensor"]


def _processes(laid: Laid, own: Experts, launched: int | None) -> Iterator[Problem]:
    """The ranks of a pipeline stage divide into groups that hold all experts. Other rules want whole replicas."""
    parallel = laid.parallel
    world = parallel.world_size if launched is None else launched
    if laid.replicas(launched) is None or world is None or min(parallel.expert, parallel.expert_cut) < 1:
        return
    stage = world // parallel.pipeline
    if stage % (parallel.expert_cut * parallel.expert) == 0:
        return
    expert, cut, pipeline = (laid.fields[name] for name in ("expert", "expert_tensor", "pipeline"))
    product = parallel.expert_cut * parallel.expert * parallel.pipeline
    shown = cut if parallel.expert_tensor is not None else laid.fields["tensor"]
    wrong = f"{world} processes are not a multiple of {shown} * {expert} * {pipeline} = {product}"
    fits = [n for n in divisors(own.count) if stage % (n * parallel.expert_cut) == 0]
    if fits:
        yield Problem(expert, parallel.expert, wrong, f"{expert}=one of {', '.join(map(str, fits))}")
    else:
        most = max(n for n in divisors(own.ffn) if stage % n == 0)
        yield Problem(cut, parallel.expert_tensor, wrong, f"{expert}=1 {cut}={most}")


def _sequence(laid: Laid) -> Iterator[Problem]:
    """Megatron refuses to train a mixture of experts otherwise (`MoELayer.forward`, in 0.16.1 and 0.19.2)."""
    if laid.parallel.tensor > 1 and not laid.parallel.sequence:
        critics = laid.fields["tensor"] == "parallel.critic.tensor"
        field = "parallel.critic.sequence" if critics else laid.fields["sequence"]
        wrong = f"Megatron-Core trains experts with {laid.fields['tensor']}={laid.parallel.tensor} only with it"
        yield Problem(laid.fields["sequence"], False, wrong, f"{field}=true, or {laid.fields['tensor']}=1")
