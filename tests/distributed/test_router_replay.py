"""Router replay in the actor, against transformers' model whose routers are made to choose the recorded experts.

The recorded experts are drawn at random, so a token, layer or expert that is taken for another one shows in the
log-probabilities, and in the gradient if a recomputation sees another choice than the forward pass.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

from megatron_tempo.config.choices import Recompute, RouterReplay
from megatron_tempo.config.method_settings import Baseline
from megatron_tempo.config.schema import Config, ParallelConfig
from megatron_tempo.config.updates import ActorUpdateConfig
from megatron_tempo.kernels.policy_loss import Experience
from megatron_tempo.models.actor import Actor
from megatron_tempo.rollout.batches import Answers, receive, share_columns
from megatron_tempo.rollout.engine import Request, Sampling
from megatron_tempo.training.context import open_context
from megatron_tempo.training.row_owners import RowOwners
from megatron_tempo.training.setup import build_actor, build_critic, build_engine, engine_weights
from megatron_tempo.types import Batch, UnlabelledPrompt
from tests.support.ranks import run_ranks
from tests.support.tiny import EXPERTS, PER_TOKEN, ragged_batch, write_model

LAYERS, ROWS = 4, 6
LAYOUTS = {
    "one": (1, ParallelConfig()),
    "cp2-ep2": (2, ParallelConfig(context=2, expert=2, recompute=Recompute.layers)),
    "dp2-ep2": (2, ParallelConfig(expert=2)),
    "tp2-pp2-ep2": (
        4,
        ParallelConfig(
            tensor=2,
            pipeline=2,
            sequence=True,
            virtual_pipeline=2,
            expert=2,
            expert_tensor=1,
            recompute=Recompute.layers,
        ),
    ),
}
UPDATE = ActorUpdateConfig()
UPDATE.optimizer.lr = 0.0


def config_of(model: Path, parallel: ParallelConfig, mode: RouterReplay = RouterReplay.on) -> Config:
    config = Config()
    config.model.path, config.model.router_replay, config.parallel = str(model), mode, parallel
    config.parallel.micro_batch_tokens = 48
    return config


def recorded() -> Batch:
    """Random experts; unknown ones of the last token of each row, and of all of the third row's prompt."""
    batch = ragged_batch(ROWS)
    tokens = int(batch.lengths.sum())
    order = torch.rand(tokens, LAYERS, EXPERTS, generator=torch.Generator().manual_seed(3)).argsort(-1)
    experts = order[..., :PER_TOKEN].to(torch.uint8)
    starts = batch.lengths.cumsum(0) - batch.lengths
    experts[batch.lengths.cumsum(0) - 1] = 255
    experts[starts[2] : starts[2] + batch.prompt_lengths[2]] = 255
    return replace(batch, experts=experts)


@contextmanager
def forced(experts: Tensor) -> Iterator[None]:
    """transformers' routers choose these in a pass over one sequence: uint8 [tokens, layers, k]."""
    left = list(experts.unbind(1))

    def forward(router: Any, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = hidden.reshape(-1, router.hidden_dim) @ router.weight.T
        given = left.pop(0).long()
        chosen = torch.where((given == 255).all(1, keepdim=True), logits.topk(PER_TOKEN).indices, given)
        return logits, logits.gather(1, chosen).softmax(-1), chosen

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(Qwen3MoeTopKRouter, "forward", forward)
        yield
    assert not left


def reference(model: Path) -> tuple[Tensor, float]:
    """Log-probabilities, and the norm of the gradient of -mean over rows of (row's number * mean log-probability)."""
    batch = recorded()
    assert batch.experts is not None
    network = transformers.AutoModelForCausalLM.from_pretrained(model, attn_implementation="eager")
    logprobs = []
    for row, experts in enumerate(batch.experts.split(batch.lengths.tolist())):
        prompt, response = batch.prompts()[row], batch.responses()[row].long()
        with forced(experts):
            logs = network(torch.cat([prompt, response])[None]).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        logprobs.append(logs.gather(1, response[:, None])[:, 0])
    loss = -sum(row * one.mean() for row, one in enumerate(logprobs)) / ROWS
    loss.backward()  # type: ignore[union-attr]
    gradients = [parameter.grad for parameter in network.parameters() if parameter.grad is not None]
    return torch.cat(logprobs).detach(), float(torch.stack([gradient.norm() for gradient in gradients]).norm())


def of_layers(batch: Batch, actor: Actor) -> Batch:
    """The batch as `receive` gives it to a rank."""
    assert batch.experts is not None
    return replace(batch, experts=batch.experts[:, actor.layers])


def measured(model: Path, layout: str) -> dict[str, Any]:
    """What an actor computes on recorded experts, with and without replay, and what a critic does with them."""
    with open_context(config_of(model, LAYOUTS[layout][1])) as context:
        actor = build_actor(context)
        batch = of_layers(recorded(), actor)
        experience = Experience(
            actor.logprobs(batch), torch.zeros(len(batch.response_tokens) + ROWS), torch.arange(ROWS).float()
        )
        agreement = actor.routing_agreement()
        order = [torch.arange(ROWS)]
        updated = actor.update(batch, experience, Baseline.before_token, UPDATE, order)
        nothing = replace(batch, experts=None)
        result = {
            "data_rank": context.layouts.actor.data_rank,
            "logprobs": actor.logprobs(batch),
            "agreement": agreement,
            "grad_norm": updated["actor/grad_norm"],
            "own": actor.logprobs(batch, replays=False),
            "nothing recorded": actor.logprobs(nothing),
        }
        critic = build_critic(context)
        for chunk in critic.model.net.chunks:
            if chunk.post_process:
                torch.nn.init.ones_(chunk.output_layer.weight)
        result["values"] = critic.values(batch), critic.values(nothing)
        return result


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_token_goes_through_its_recorded_experts(layout: str, tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model", family="qwen3_moe", layers=LAYERS)
    wanted, norm = reference(folder)
    ranks = run_ranks(measured, LAYOUTS[layout][0], tmp_path / "ranks", folder, layout)
    by_replica = {rank["data_rank"]: rank for rank in ranks}.values()  # each has its own rows, and zeros
    replayed, own, plain = (sum(one[name] for one in by_replica) for name in ("logprobs", "own", "nothing recorded"))
    torch.testing.assert_close(replayed, wanted, atol=1e-4, rtol=0)
    assert torch.equal(own, plain)
    assert (own - wanted).abs().max() > 0.1, "without replay it is another policy"
    for rank in ranks:
        assert rank["grad_norm"] == pytest.approx(norm, rel=1e-3)
        assert rank["agreement"] == ranks[0]["agreement"]
        assert 0.0 < rank["agreement"] < 0.2, "random choices are the routers' own in about one of 28 pairs"
        assert torch.equal(*rank["values"]), "the critic's routers choose"
        assert rank["values"][0].abs().max() > 0


PROMPTS = [UnlabelledPrompt(f"u:{i}", "", tuple(range(2 + i, 5 + 2 * i))) for i in range(4)]


def of_engine(model: Path, mode: RouterReplay) -> tuple[float | None, float, float]:
    """The agreement with the embedded engine, its gap to the actor, and that of the actor's own routing."""
    with open_context(config_of(model, ParallelConfig(), mode)) as context:
        actor, engine = build_actor(context), build_engine(context)
        engine.load_weights(engine_weights(actor, context), 0)
        requests = [Request(prompt.token_ids, 2, 7 + i) for i, prompt in enumerate(PROMPTS)]
        answers = dict(engine.start(requests, Sampling(1.0, 24, with_experts=mode is not RouterReplay.off)))
        owners = RowOwners(actor, None)
        collected = share_columns(PROMPTS, Answers(answers, {}, {})).take(0, len(PROMPTS))
        owned = owners.of_batch(collected.columns)
        batch = receive(replace(collected, columns=owned), owners.held(owned), layers=owners.layers)
        assert (batch.experts is None) == (mode is RouterReplay.off)
        gap, agreement = actor.gap_to_engine(batch, actor.logprobs(batch))[1], actor.routing_agreement()
        if batch.experts is not None:  # another choice for one token in one layer
            batch.experts[3, 1] = (batch.experts[3, 1] + 1) % EXPERTS
        return agreement, gap, actor.gap_to_engine(batch, actor.logprobs(batch))[1]


@pytest.mark.parametrize("mode", RouterReplay)
def test_the_actors_routing_is_the_engines_to_the_index(mode: RouterReplay, tmp_path: Path) -> None:
    """In fp32 both choose the same. If one recorded choice is changed, log-probabilities differ only with replay on."""
    folder = write_model(tmp_path / "model", family="qwen3_moe", layers=LAYERS)
    ((agreement, gap, perturbed),) = run_ranks(of_engine, 1, tmp_path / "ranks", folder, mode)
    assert agreement == (None if mode is RouterReplay.off else 1.0)
    assert gap < 1e-4
    assert (perturbed > 1e-2) == (mode is RouterReplay.on)
