"""A step of each method without a critic, against the same step by transformers' model and torch's own Adam.

Also on the layers and the optimizer that a GPU has, by the stand-in for Transformer Engine.
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor

from megatron_tempo.config.choices import Layers
from megatron_tempo.config.method_settings import Method, ScrlSettings
from megatron_tempo.config.schema import Config
from megatron_tempo.config.stages import StageConfig, settings_of
from megatron_tempo.methods import METHODS
from megatron_tempo.methods.learner import Learner, Rollouts
from megatron_tempo.training.context import open_context
from megatron_tempo.training.setup import build_actor
from megatron_tempo.types import Batch
from megatron_tempo.weights.export import weights_of
from tests.support.fork_server import TE_FORK_SERVER
from tests.support.ranks import run_ranks
from tests.support.tiny import ragged_batch, write_model

# Two prompts of four responses each. Whose answer is what, who is right, and what each method makes of it by hand.
CLASSES = [0, 1, 0, -1, 0, 0, 0, 0]
CORRECT = [1.0, 0.0, 0.0, 0.0, 1.0, 1.0, 1.0, 0.0]
HALF = 0.5 / (3**-0.5 + 1e-6)  # rewards 1 0 1 0: variance 4 (1/4) / 3
QUARTER = 0.25 / (0.5 + 1e-6)  # rewards 1 0 0 0: variance (9 + 3) / 16 / 3
EIGHTH = 0.125 / (48**-0.5 + 1e-6)  # shares 1/2 1/4 1/2 1/4: variance 4 (1/64) / 3
ADVANTAGES = {
    Method.grpo: [3 * QUARTER, -QUARTER, -QUARTER, -QUARTER, QUARTER, QUARTER, QUARTER, -3 * QUARTER],
    Method.ttrl: [HALF, -HALF, HALF, -HALF, 0.0, 0.0, 0.0, 0.0],
    Method.ttrl_guard: [HALF, -HALF, HALF, -HALF, 0.0, 0.0, 0.0, 0.0],  # without earlier votes as ttrl
    Method.empo: [EIGHTH, -EIGHTH, EIGHTH, -EIGHTH, 0.0, 0.0, 0.0, 0.0],
    Method.scrl: [HALF, -HALF, HALF, -HALF, 0.0, 0.0, 0.0, 0.0],  # rewards 1/2 0 1/2 0, without the entropy's part
}
TESTED = (*ADVANTAGES, Method.intuitor, Method.entropy_min)


def rollouts() -> Batch:
    batch = ragged_batch(8, per_prompt=4)
    return replace(batch, correct=torch.tensor(CORRECT), answer_class=torch.tensor(CLASSES))


def stage_of(method: Method) -> StageConfig:
    stage = StageConfig(settings_of(method), responses_per_prompt=4)
    stage.actor.mini_batch_prompts = 2
    if isinstance(stage.settings, ScrlSettings):
        stage.settings.entropy_penalty = 0.0
    # The large epsilon keeps Adam from making a full step of what is rounding noise in a gradient.
    stage.actor.optimizer.lr, stage.actor.optimizer.eps, stage.actor.optimizer.clip_grad = 2e-3, 1e-4, 100.0
    return stage


Updated = tuple[dict[Method, dict[str, Tensor]], dict[Method, dict[str, float]]]


def updated(model: Path, layers: Layers) -> Updated:
    """The actor's weights after one iteration of each method, by Hugging Face's names, and its metrics."""
    config = Config()
    config.model.path, config.model.layers = str(model), layers
    config.parallel.micro_batch_tokens = 50
    results, metrics = {}, {}
    batch = rollouts()
    with open_context(config) as context:
        for method in TESTED:
            actor = build_actor(context)
            learner = Learner(
                actor, None, actor.logprobs, lambda name: nullcontext(), seed="0", iteration=1, max_response_tokens=64
            )
            labelled = replace(batch, answer_class=None) if method is Method.grpo else None
            unlabelled = None if method is Method.grpo else replace(batch, correct=None)
            metrics[method] = METHODS[method](learner, Rollouts(labelled, unlabelled), stage_of(method), 0)
            weights = weights_of(actor.model, context.config).everywhere()
            results[method] = {key: value.clone() for bucket in weights for key, value in bucket}
    return results, metrics


def means(actor: torch.nn.Module, entropy: bool) -> Tensor:
    """The mean over each response's tokens of their log-probability, or of the entropy where they were drawn: [8]."""

    def mean(prompt: Tensor, response: Tensor) -> Tensor:
        logs = log_probabilities(actor, prompt, response)
        return -(logs.exp() * logs).sum(1).mean() if entropy else logs.gather(1, response[:, None]).mean()

    batch = rollouts()
    return torch.stack([mean(*row) for row in zip(batch.prompts(), batch.responses(), strict=True)])


def log_probabilities(actor: torch.nn.Module, prompt: Tensor, response: Tensor) -> Tensor:
    """Of the whole vocabulary at each of a response's tokens: [T, V]."""
    return actor(torch.cat([prompt, response])[None]).logits[0, len(prompt) - 1 : -1].log_softmax(-1)


@torch.no_grad()
def certain(actor: torch.nn.Module) -> Tensor:
    """Intuitor's advantages: KL(U || p) is -log V less the mean log-probability of a token."""
    batch = rollouts()
    logs = [log_probabilities(actor, *row).double() for row in zip(batch.prompts(), batch.responses(), strict=True)]
    rewards = torch.stack([-math.log(x.shape[1]) - x.mean() for x in logs]).view(2, 4)
    away = rewards - rewards.mean(1, keepdim=True)
    return (away / (rewards.std(1, keepdim=True) + 1e-6)).flatten().float()


def reference(model: Path, method: Method) -> tuple[dict[str, Tensor], Tensor]:
    """The same by hand: all ratios are 1, so a response pulls by its advantage at the mean of its log-probabilities.

    Returns the weights, and how much the step has gained on the mean of the method's objective.
    """
    actor = transformers.AutoModelForCausalLM.from_pretrained(model)
    entropy = method is Method.entropy_min
    weights = certain(actor) if method is Method.intuitor else torch.tensor(ADVANTAGES.get(method, [-1.0] * 8))
    optimizer = torch.optim.Adam(actor.parameters(), lr=2e-3, eps=1e-4)
    before = means(actor, entropy)
    (-(before * weights).mean()).backward()
    optimizer.step()
    with torch.no_grad():
        after = means(actor, entropy)
    return actor.state_dict(), ((after - before.detach()) * weights).mean()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "model", layers=2)


@pytest.fixture(scope="module")
def steps(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Updated]:
    out = tmp_path_factory.mktemp("ranks")
    found = {str(world): run_ranks(updated, world, out / str(world), model, Layers.local)[0] for world in (1, 2)}
    given = model, Layers.transformer_engine
    return found | {"te": run_ranks(updated, 1, out / "te", *given, server=TE_FORK_SERVER)[0]}


@pytest.mark.parametrize("world", ["1", "2", "te"])
@pytest.mark.parametrize("method", TESTED)
def test_a_step_agrees_with_plain_torch(model: Path, steps: dict[str, Updated], method: Method, world: str) -> None:
    expected, gained = reference(model, method)
    start = transformers.AutoModelForCausalLM.from_pretrained(model).state_dict()
    for key, weight in steps[world][0][method].items():
        moved = (expected[key] - start[key]).abs().max()
        assert moved > 0
        assert (weight - expected[key]).abs().max() < 1e-2 * moved, key
    # It goes the right way: what was better than the others has become likelier against them, or entropy is lower.
    assert gained > 0


@pytest.mark.parametrize("world", ["1", "2", "te"])
def test_scrl_reads_the_entropies_of_the_actors_distribution(
    model: Path, steps: dict[str, Updated], world: str
) -> None:
    actor, batch, means = transformers.AutoModelForCausalLM.from_pretrained(model), rollouts(), []
    with torch.no_grad():
        for prompt, response in zip(batch.prompts(), batch.responses(), strict=True):
            logs = actor(torch.cat([prompt, response])[None]).logits[0, len(prompt) - 1 : -1].double().log_softmax(-1)
            means.append(float(-(logs.exp() * logs).sum(-1).mean()))
    assert steps[world][1][Method.scrl]["answers/token_entropy"] == pytest.approx(sum(means) / len(means), rel=1e-5)
