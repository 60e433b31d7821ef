"""A few optimizer steps of actor and critic against the same steps by transformers' models and torch's own AdamW."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor

from megatron_tempo.algorithm.correction import correct
from megatron_tempo.config.choices import Fusions, Layers, Logits, Recompute
from megatron_tempo.config.correction import CorrectionConfig, CorrectionLevel, OutOfBounds
from megatron_tempo.config.method_settings import Baseline
from megatron_tempo.config.schema import Config, CriticLayoutConfig, ParallelConfig
from megatron_tempo.config.updates import ActorUpdateConfig, CriticUpdateConfig
from megatron_tempo.kernels.policy_loss import Experience
from megatron_tempo.models.packing import MicroBatch
from megatron_tempo.training.context import open_context
from megatron_tempo.training.setup import build_actor, build_critic
from megatron_tempo.types import Batch
from megatron_tempo.weights.export import weights_of
from tests.support.matrix import matrix
from tests.support.ranks import run_ranks
from tests.support.tiny import ragged_batch, write_model

ROWS = [torch.tensor([0, 1, 4, 5]), torch.tensor([2, 3, 6, 7])]  # the mini-batches
KINDS = {
    "plain": (ActorUpdateConfig(clip_low=0.02, clip_high=0.03, entropy_coef=0.01), CriticUpdateConfig()),
    "every option": (
        ActorUpdateConfig(
            clip_low=0.02,
            clip_high=0.03,
            dual_clip=1.04,
            entropy_coef=0.01,
            kl_coef=0.3,
            correction=CorrectionConfig(CorrectionLevel.sequence, OutOfBounds.mask, low=0.6, high=1.55),
            whiten_advantages=True,
        ),
        CriticUpdateConfig(clip=0.01),
    ),
}
for optimizer in (update.optimizer for kind in KINDS.values() for update in kind):
    # The gradients' norms are above 0.5, so the clip is at work. The large epsilon keeps Adam from making a full step
    # of what is rounding noise in a gradient.
    optimizer.lr, optimizer.weight_decay, optimizer.clip_grad, optimizer.eps = 2e-3, 0.1, 0.5, 1e-4


def normal(batch: Batch, seed: int) -> Tensor:
    return torch.randn(int(batch.response_lengths.sum()), generator=torch.Generator().manual_seed(seed))


def advantages_of(batch: Batch) -> Tensor:
    return normal(batch, 5)


def around(old: Tensor, batch: Batch, seed: int) -> Tensor:
    """Another policy's log-probabilities: the engine's, the reference's."""
    return old + 0.3 * normal(batch, seed)


# processes, and what of the config is not as it comes
LAYOUTS: dict[str, tuple[int, ParallelConfig, Logits]] = {
    "one": (1, ParallelConfig(), Logits.recomputed),
    "dp2": (2, ParallelConfig(), Logits.recomputed),  # the moments for whitening are of both replicas
    "tp2-pp2": (4, ParallelConfig(tensor=2, pipeline=2), Logits.recomputed),
    "tp2-stored": (2, ParallelConfig(tensor=2), Logits.stored),
    "tp2-sequence": (2, ParallelConfig(tensor=2, sequence=True), Logits.recomputed),
    "tp2-sequence-attention": (
        2,
        ParallelConfig(tensor=2, sequence=True, recompute=Recompute.attention),
        Logits.recomputed,
    ),
    "tp2-layers": (2, ParallelConfig(tensor=2, recompute=Recompute.layers), Logits.recomputed),
    "tp2-pp2-sequence": (4, ParallelConfig(tensor=2, pipeline=2, sequence=True), Logits.recomputed),
    "offload": (1, ParallelConfig(offload=True), Logits.recomputed),
    "pp2-critic-tp2-offload": (
        2,
        ParallelConfig(pipeline=2, critic=CriticLayoutConfig(tensor=2, pipeline=1), offload=True),
        Logits.recomputed,
    ),
    "cp2": (2, ParallelConfig(context=2), Logits.stored),
    "cp2-dp2-layers": (4, ParallelConfig(context=2, recompute=Recompute.layers), Logits.recomputed),
    "cp2-tp2-sequence": (4, ParallelConfig(context=2, tensor=2, sequence=True), Logits.recomputed),
    "cp2-pp2-attention": (4, ParallelConfig(context=2, pipeline=2, recompute=Recompute.attention), Logits.recomputed),
    "tp2-pp2-sequence-layers": (
        4,
        ParallelConfig(tensor=2, pipeline=2, sequence=True, recompute=Recompute.layers),
        Logits.recomputed,
    ),
}
MODELS = {"untied": {}, "tied": {"tied": True}, "olmo3": {"family": "olmo3"}, "qwen2": {"family": "qwen2"}}
CASES = [(model, layout) for model in ("untied", "tied") for layout in ("one", "dp2", "tp2-pp2", "tp2-stored")]
CASES += [("olmo3", layout) for layout in ("one", "tp2-pp2", "tp2-sequence", "tp2-pp2-sequence")]
CASES += [("tied", "cp2-pp2-attention"), ("untied", "cp2-dp2-layers"), ("untied", "cp2")]
CASES += [("qwen2", "cp2-tp2-sequence"), ("qwen2", "tp2-pp2-sequence")]
CASES += [("untied", "offload"), ("tied", "pp2-critic-tp2-offload")]
CASES += [("olmo3", layout) for layout in ("cp2", "cp2-tp2-sequence", "tp2-pp2-sequence-layers")]


def updated(
    model: Path, kind: str, layout: str, layers: Layers, fusions: Fusions = Fusions.auto
) -> dict[str, dict[str, Tensor]]:
    """The weights after the steps, by Hugging Face's names."""
    config = Config()
    config.model.path, config.model.layers, config.model.fusions = str(model), layers, fusions
    _, config.parallel, config.model.logits = LAYOUTS[layout]
    config.parallel.micro_batch_tokens = 50
    batch = ragged_batch(8)
    assert batch.correct is not None
    with open_context(config) as context:
        actor, critic = build_actor(context), build_critic(context)
        # Where the rewards are 0, the values before the tokens are the negative advantages.
        parts = advantages_of(batch).split(batch.response_lengths.tolist())
        values = torch.cat([x for part in parts for x in (-part, torch.zeros(1))])
        old, rewards = actor.logprobs(batch), torch.zeros(len(batch))
        of_actor, of_critic = KINDS[kind]
        engine, other = around(old, batch, 6), around(old, batch, 7) if of_actor.kl_coef else None
        correction = correct(old, engine, batch.held_responses, of_actor.correction)
        experience = Experience(old, values, rewards, correction.weights, other)
        actor.update(batch, experience, Baseline.before_token, of_actor, ROWS)
        critic.update(batch, batch.correct, of_critic, ROWS)
        return {
            name: {
                key: value.clone()
                for bucket in weights_of(one.model, context.config).everywhere()
                for key, value in bucket
            }
            for name, one in (("actor", actor), ("critic", critic))
        }


def reference(model: Path, kind: str) -> dict[str, dict[str, Tensor]]:
    """The same by transformers and torch, a row at a time."""
    of_actor, _ = KINDS[kind]
    batch = ragged_batch(8)
    lengths = batch.response_lengths.tolist()
    rows = list(zip(batch.prompts(), batch.responses(), strict=True))
    flat = advantages_of(batch)
    white = (flat - flat.mean()) / (flat.std() + 1e-8) if of_actor.whiten_advantages else flat
    advantages = white.split(lengths)
    actor = transformers.AutoModelForCausalLM.from_pretrained(model)
    critic = transformers.AutoModelForTokenClassification.from_pretrained(model, num_labels=1)
    torch.nn.init.zeros_(critic.score.weight)
    torch.nn.init.zeros_(critic.score.bias)

    def distribution(i: int) -> tuple[Tensor, Tensor]:
        prompt, response = rows[i]
        logs = actor(torch.cat([prompt, response])[None]).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        return logs.gather(1, response[:, None])[:, 0], -(logs.exp() * logs).sum(-1)

    with torch.no_grad():
        old = [distribution(i)[0] for i in range(len(rows))]
        engine, other = (around(torch.cat(old), batch, seed).split(lengths) for seed in (6, 7))

    def actor_loss(i: int) -> Tensor:
        logprobs, entropy = distribution(i)
        sequence = (logprobs - old[i]).mean().exp().detach()
        ratio = sequence * (logprobs - logprobs.detach()).exp()
        clipped = ratio.clamp(0.98, 1.03)
        objective = torch.minimum(ratio * advantages[i], clipped * advantages[i])
        if kind == "plain":
            return -(objective + 0.01 * entropy).mean()
        objective = torch.where(advantages[i] < 0, torch.maximum(objective, 1.04 * advantages[i]), objective)
        weight = math.exp(math.fsum((old[i] - engine[i]).tolist()))  # the importance ratio of the response
        masked.append(not 0.6 <= weight <= 1.55)
        if masked[-1]:
            return 0.0 * logprobs.sum()
        away = other[i] - logprobs
        return -(weight * objective + 0.01 * entropy - 0.3 * (away.exp() - 1 - away)).mean()

    def critic_values(i: int) -> Tensor:
        prompt, response = rows[i]
        return critic(torch.cat([prompt, response])[None]).logits[0, len(prompt) - 1 :, 0]

    def critic_loss(i: int) -> Tensor:
        assert batch.correct is not None
        values, correct = critic_values(i), batch.correct[i]
        if kind == "plain":
            return (values - correct).square().mean()
        moved = values.mean() - before[i].mean()
        held.append(moved.abs().item() > 0.01)
        shift = moved.clamp(-0.01, 0.01) - moved
        return torch.maximum((values - correct).square(), (values + shift - correct).square()).mean()

    held, masked = list[bool](), list[bool]()
    with torch.no_grad():
        before = [critic_values(i) for i in range(len(rows))]

    for module, loss in ((actor, actor_loss), (critic, critic_loss)):
        decayed = [p for p in module.parameters() if p.ndim > 1]
        others = [p for p in module.parameters() if p.ndim == 1]  # Megatron does not decay norms and biases
        groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(groups, lr=2e-3, betas=(0.9, 0.999), eps=1e-4)
        for mini_batch in ROWS:
            optimizer.zero_grad()
            torch.stack([loss(i) for i in mini_batch.tolist()]).mean().backward()
            norm = torch.nn.utils.clip_grad_norm_(module.parameters(), 0.5)
            assert norm > 0.5 or kind != "plain"  # what the critic's own clip holds has little gradient left
            optimizer.step()
    assert kind == "plain" or any(held), "the critic's clip is at work"
    assert kind == "plain" or (any(masked) and not all(masked)), "some responses are masked"
    return {"actor": actor.state_dict(), "critic": critic.state_dict()}


EVERY = [(*case, kind) for case in CASES for kind in KINDS]
FEW = [(model, layout, "plain") for model, layout in (("tied", "one"), ("olmo3", "tp2-sequence"), ("untied", "cp2"))]
FEW += [("untied", layout, "every option") for layout in ("one", "dp2", "tp2-stored", "offload", "cp2-dp2-layers")]
FEW += [("tied", layout, "every option") for layout in ("tp2-pp2", "cp2-pp2-attention", "pp2-critic-tp2-offload")]
FEW += [("olmo3", "tp2-pp2-sequence-layers", "every option"), ("qwen2", "cp2-tp2-sequence", "every option")]


@pytest.mark.parametrize(("model", "layout", "kind"), matrix(EVERY, FEW))
def test_steps_agree_with_plain_torch(tmp_path: Path, model: str, layout: str, kind: str) -> None:
    path = write_model(tmp_path / "model", **MODELS[model])
    result = run_ranks(updated, LAYOUTS[layout][0], tmp_path / "ranks", path, kind, layout, Layers.local)[0]
    assert_steps(path, kind, result)


def assert_steps(path: Path, kind: str, result: dict[str, dict[str, Tensor]]) -> None:
    expected = reference(path, kind)
    start = transformers.AutoModelForCausalLM.from_pretrained(path).state_dict()
    for name, weights in result.items():
        for key, weight in weights.items():
            torch.testing.assert_close(weight, expected[name][key], rtol=1e-4, atol=2e-6, msg=f"{name} {key}")
            if key in start:
                moved = (expected[name][key] - start[key]).abs().max()
                assert moved > 0
                assert (weight - expected[name][key]).abs().max() < 1e-2 * moved, f"{name} {key}"


def kept(model: Path, recompute: Recompute) -> int:
    """Bytes that a critic's decoder keeps of its forward pass for the backward pass, weights aside."""
    config = Config()
    config.model.path, config.parallel.recompute = str(model), recompute
    batch = ragged_batch(8)
    assert batch.correct is not None
    with open_context(config) as context, pytest.MonkeyPatch.context() as monkeypatch:
        critic = build_critic(context)
        net = critic.model.net
        weights = {parameter.untyped_storage().data_ptr() for parameter in net.parameters()}
        tensors: dict[int, Tensor] = {}  # the tensors too, so that no place in memory is used twice
        sizes: list[int] = []

        def pack(tensor: Tensor) -> Tensor:
            tensors.setdefault(tensor.untyped_storage().data_ptr(), tensor)
            return tensor

        def head(hidden: Tensor, micro: MicroBatch) -> Tensor:
            sizes.append(sum(x.untyped_storage().nbytes() for place, x in tensors.items() if place not in weights))
            return type(net).head(net, hidden, micro)

        monkeypatch.setattr(net, "head", head)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            critic.update(batch, batch.correct, CriticUpdateConfig(), [torch.arange(8)])
        (size,) = sizes
        return size


def test_recomputed_activations_are_not_kept(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", layers=4)
    kinds = (Recompute.none, Recompute.attention, Recompute.layers)
    none, attention, layers = (run_ranks(kept, 1, tmp_path / kind.name, model, kind)[0] for kind in kinds)
    assert layers < none / 4
    assert layers < attention < none
