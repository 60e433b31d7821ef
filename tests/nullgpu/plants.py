"""Faults that a rank of a rehearsal plants in its own process: each is one that a GPU refuses."""

from __future__ import annotations

import time

import torch
import torch.distributed as dist
import triton
import triton.language as tl

from megatron_tempo.kernels import value_loss_triton
from megatron_tempo.models import actor, critic, trained
from megatron_tempo.models.attention import PackedAttention
from megatron_tempo.training.trainer import Trainer


def device_mix() -> None:
    """The policy loss gets the rewards on the CPU, as a forgotten `.to(device)` would leave them."""
    original = actor._of_micro_batch

    def forgotten(experience, micro):
        made = original(experience, micro)
        return made.__class__(**{**_fields(made), "rewards": made.rewards.cpu()})

    actor._of_micro_batch = forgotten


def cpu_tensor_in_nccl_group() -> None:
    """Weights are broadcast from the CPU in a group of NCCL alone, as servers have."""

    def sync(trainer) -> None:
        with trainer.phase("sync"):
            group = dist.new_group(backend="nccl")
            dist.broadcast(torch.zeros(4), src=0, group=group)

    Trainer.load_engine = sync


def wrong_type() -> None:
    """Attention gets keys in fp32 next to queries in bf16."""
    original = PackedAttention.forward

    def forward(net, query, key, *given, **named):
        return original(net, query, key.float(), *given, **named)

    PackedAttention.forward = forward


def kernel_with_a_type_error() -> None:
    """A kernel adds a text to a number."""
    _instead_of_a_kernel(_adds_text)


def kernel_with_too_much_shared_memory() -> None:
    """A kernel whose two operands of a product need 512 KB of shared memory: an H100 has 227."""
    _instead_of_a_kernel(_large_product)


@triton.jit
def _adds_text(pointer, size: tl.constexpr):
    tl.store(pointer, tl.load(pointer) + "one")


@triton.jit
def _large_product(pointer, size: tl.constexpr):
    at = tl.arange(0, size)[:, None] * size + tl.arange(0, size)[None, :]
    left, right = tl.load(pointer + at), tl.load(pointer + size * size + at)
    tl.store(pointer + at, tl.dot(left, right))


def _instead_of_a_kernel(kernel) -> None:
    """The value loss launches `kernel`."""

    def loss(*_):
        kernel[(1,)](torch.zeros(2 * 256 * 256, device="cuda"), size=256)
        raise AssertionError("the kernel was compiled")

    value_loss_triton._ValueLoss.forward = staticmethod(loss)


def hoarder() -> None:
    """Each pass of a model keeps 600 MB of host memory that it writes."""
    original, kept = trained.Model.read, []

    def read(model, *given):
        kept.append(torch.ones(600 * 2**20, dtype=torch.uint8))
        return original(model, *given)

    trained.Model.read = read


def sleeper() -> None:
    """The critic's update never ends."""

    def update(*_):
        time.sleep(3600)

    critic.Critic.update = update


def _fields(made) -> dict[str, object]:
    return {name: getattr(made, name) for name in made.__dataclass_fields__}
