"""Log-probability and entropy of tokens from logits whose vocabulary is spread over the tensor-parallel ranks."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

# Below this, exp() is 0 in fp32: in p log p a lower logarithm, -inf for padding, may stand as this one. It is small
# enough that no gradient from behind makes it overflow.
_LOWEST = -200.0


def logprobs_and_entropy(logits: Tensor, targets: Tensor, vocab: int, temperature: float) -> tuple[Tensor, Tensor]:
    """log pi(target) and the entropy of pi = softmax(logits / temperature), in nats, in fp32, with gradients.

    Args:
        logits: [T, padded vocabulary / tensor], this rank's columns.
        targets: int64 [T], numbers in the whole vocabulary.
        vocab: size of the vocabulary; columns behind it are padding and get no probability.
        temperature: > 0.

    Returns: [T], [T], the same on every tensor rank.
    """
    return _LogprobsAndEntropy.apply(logits, targets, vocab, temperature)


class _LogprobsAndEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, vocab: int, temperature: float) -> tuple[Tensor, Tensor]:
        group = parallel_state.get_tensor_model_parallel_group()
        first = parallel_state.get_tensor_model_parallel_rank() * logits.shape[1]
        scaled = logits.float() / temperature
        padding = max(0, min(logits.shape[1], first + logits.shape[1] - vocab))
        if padding:
            scaled[:, -padding:] = float("-inf")

        peak = scaled.amax(dim=1) if len(targets) else scaled.new_zeros(0)
        dist.all_reduce(peak, op=dist.ReduceOp.MAX, group=group)
        scaled -= peak[:, None]
        mine = (targets >= first) & (targets < first + logits.shape[1])
        column = torch.where(mine, targets - first, 0)
        at_target = torch.where(mine, scaled.gather(1, column[:, None]).squeeze(1), 0.0)
        exponentials = scaled.exp()
        weighted = (exponentials * scaled.clamp(min=_LOWEST)).sum(1)
        sums = torch.stack([exponentials.sum(1), weighted, at_target])
        dist.all_reduce(sums, group=group)
        total, weighted, at_target = sums
        log_total = total.log()
        entropy = log_total - weighted / total
        probabilities = exponentials.div_(total[:, None])
        ctx.save_for_backward(probabilities, log_total, entropy, mine, column, scaled)
        ctx.temperature, ctx.dtype = temperature, logits.dtype
        return at_target - log_total, entropy

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        grad_logprob, grad_entropy = grads
        probabilities, log_total, entropy, mine, column, scaled = ctx.saved_tensors
        # d logp / d z_j = [j = target] - p_j;   d H / d z_j = -p_j (log p_j + H)
        log_p = (scaled - log_total[:, None]).clamp(min=_LOWEST)
        inner = grad_logprob[:, None] + grad_entropy[:, None] * (log_p + entropy[:, None])
        grad = -probabilities * inner
        grad.scatter_add_(1, column[:, None], torch.where(mine, grad_logprob, 0.0)[:, None])
        return (grad / ctx.temperature).to(ctx.dtype), None, None, None
