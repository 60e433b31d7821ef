"""Runs every kernel once on CUDA, at a size with several blocks and tiles, for compute-sanitizer."""

from __future__ import annotations

import torch

from megatron_tempo.config.method_settings import Baseline
from megatron_tempo.config.updates import ActorUpdateConfig, Ratio
from megatron_tempo.kernels import kernels_for
from megatron_tempo.kernels.policy_loss import Experience
from megatron_tempo.kernels.rows import Rows


def main() -> None:
    device = torch.device("cuda")
    kernels = kernels_for(device)
    rows = Rows.of(torch.tensor([3000, 0, 1, 5000]), device)
    tokens, n = rows.total, len(rows)

    def noise(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.randn(*shape, device=device, dtype=dtype)

    for ratio in Ratio:
        config = ActorUpdateConfig(ratio=ratio, dual_clip=3.0, entropy_coef=0.1, kl_coef=0.1)
        values, rewards = noise(tokens + n), noise(n)
        moments = kernels.advantage_moments(values, rewards, rows, Baseline.before_token)
        given = Experience(noise(tokens), values, rewards, noise(tokens).relu(), noise(tokens), moments)
        leaves = noise(tokens).requires_grad_(), noise(tokens).requires_grad_()
        loss, _ = kernels.policy_loss(*leaves, given, rows, Baseline.before_token, config)
        loss.sum().backward()
    leaf = noise(tokens).requires_grad_()
    kernels.value_loss(leaf, noise(n), rows, clip=0.1, old_values=noise(tokens))[0].sum().backward()
    targets = torch.randint(0, 20000, (300,), device=device)
    logits = noise(300, 20016, dtype=torch.bfloat16).requires_grad_()
    sum(kernels.logprobs_and_entropy(logits * 1.0, targets, 20000, 0.9)).sum().backward()
    hidden, weight = (noise(k, 512, dtype=torch.bfloat16).requires_grad_() for k in (300, 20016))
    sum(kernels.linear_logprobs_and_entropy(hidden, weight, targets, 20000, 0.9)).sum().backward()
    torch.cuda.synchronize()


if __name__ == "__main__":
    main()
