"""A few optimizer steps of actor and critic against the same steps by transformers' models and torch's own AdamW."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor

from megatron_tempo.config.schema import ActorUpdateConfig, Baseline, Config, CriticUpdateConfig
from megatron_tempo.kernels.policy_loss import Experience
from megatron_tempo.types import Batch
from megatron_tempo.wiring import build_actor, build_critic, open_workplace, weights_of
from tests.support.ranks import run_ranks
from tests.support.tiny import ragged_batch, write_model

ROWS = [torch.tensor([0, 1, 4, 5]), torch.tensor([2, 3, 6, 7])]  # the mini-batches
ACTOR = ActorUpdateConfig(clip_low=0.02, clip_high=0.03, entropy_coef=0.01)
CRITIC = CriticUpdateConfig()
for optimizer in (ACTOR.optimizer, CRITIC.optimizer):
    # The gradients' norms are above 0.5, so the clip is at work. The large epsilon keeps Adam from making a full step
    # of what is rounding noise in a gradient.
    optimizer.lr, optimizer.weight_decay, optimizer.clip_grad, optimizer.eps = 2e-3, 0.1, 0.5, 1e-4


def advantages_of(batch: Batch) -> Tensor:
    return torch.randn(int(batch.response_lengths.sum()), generator=torch.Generator().manual_seed(5))


def updated(model: Path, tensor: int, pipeline: int) -> dict[str, dict[str, Tensor]]:
    """The weights after the steps, by Hugging Face's names."""
    config = Config()
    config.model.path = str(model)
    config.parallel.tensor, config.parallel.pipeline = tensor, pipeline
    config.parallel.micro_batch_tokens = 50
    batch = ragged_batch(8)
    assert batch.correct is not None
    with open_workplace(config) as place:
        actor, critic = build_actor(place), build_critic(place)
        # Where the rewards are 0, the values before the tokens are the negative advantages.
        parts = advantages_of(batch).split(batch.response_lengths.tolist())
        values = torch.cat([x for part in parts for x in (-part, torch.zeros(1))])
        experience = Experience(actor.logprobs(batch), values, torch.zeros(len(batch)))
        actor.update(batch, experience, Baseline.before_token, ACTOR, ROWS)
        critic.update(batch, batch.correct, CRITIC, ROWS)
        return {
            name: {key: value.clone() for bucket in weights_of(one.model, place) for key, value in bucket}
            for name, one in (("actor", actor), ("critic", critic))
        }


def reference(model: Path) -> dict[str, dict[str, Tensor]]:
    """The same by transformers and torch, a row at a time."""
    batch = ragged_batch(8)
    rows = list(zip(batch.prompts(), batch.responses(), strict=True))
    advantages = advantages_of(batch).split(batch.response_lengths.tolist())
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

    def actor_loss(i: int) -> Tensor:
        logprobs, entropy = distribution(i)
        sequence = (logprobs - old[i]).mean().exp().detach()
        ratio = sequence * (logprobs - logprobs.detach()).exp()
        clipped = ratio.clamp(0.98, 1.03)
        return -(torch.minimum(ratio * advantages[i], clipped * advantages[i]) + 0.01 * entropy).mean()

    def critic_loss(i: int) -> Tensor:
        prompt, response = rows[i]
        values = critic(torch.cat([prompt, response])[None]).logits[0, len(prompt) - 1 :, 0]
        assert batch.correct is not None
        return (values - batch.correct[i]).square().mean()

    for module, loss in ((actor, actor_loss), (critic, critic_loss)):
        decayed = [p for p in module.parameters() if p.ndim > 1]
        others = [p for p in module.parameters() if p.ndim == 1]  # Megatron does not decay norms and biases
        groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(groups, lr=2e-3, betas=(0.9, 0.999), eps=1e-4)
        for mini_batch in ROWS:
            optimizer.zero_grad()
            torch.stack([loss(i) for i in mini_batch.tolist()]).mean().backward()
            norm = torch.nn.utils.clip_grad_norm_(module.parameters(), 0.5)
            assert norm > 0.5
            optimizer.step()
    return {"actor": actor.state_dict(), "critic": critic.state_dict()}


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize(("tensor", "pipeline", "world"), [(1, 1, 1), (2, 2, 4)])
def test_steps_agree_with_plain_torch(tmp_path: Path, tied: bool, tensor: int, pipeline: int, world: int) -> None:
    model = write_model(tmp_path / "model", tied=tied)
    expected = reference(model)
    found = run_ranks(updated, world, tmp_path / "ranks", model, tensor, pipeline)[0]
    start = transformers.AutoModelForCausalLM.from_pretrained(model).state_dict()
    for name, weights in found.items():
        for key, weight in weights.items():
            torch.testing.assert_close(weight, expected[name][key], rtol=1e-4, atol=2e-6, msg=f"{name} {key}")
            assert key not in start or not torch.equal(weight, start[key])
