"""Bytes of the heads: the actor's output layer on R tokens, the critic's values.

Notation as in activations.py; v is the rank's rows of the output matrix, including padding.
"""

from __future__ import annotations

from megatron_tempo.config.choices import Logits
from megatron_tempo.config.model_shape import ModelShape
from megatron_tempo.config.sizes import padded_vocab
from megatron_tempo.plan.layout import PlannedLayout, PlannedMachine, PlannedMicroBatch
from megatron_tempo.plan.parameters import Role

# Constants of kernels/linear_logprobs.py and linear_logprobs_triton.py, which import torch; a test compares them.
PIECE = 1 << 24
BLOCK_ROWS = 1 << 16
BLOCK_BYTES = 1 << 29
MOST_SHARES = 16


def update(
    shape: ModelShape,
    layout: PlannedLayout,
    machine: PlannedMachine,
    micro: PlannedMicroBatch,
    logits: Logits,
    role: Role,
) -> float:
    """Peak bytes of the head in an optimizer step, when its gradient is computed.

    Hidden states of R tokens and their gradient, 2 a R h, the gradient of the output matrix, a v h; and

    - recomputed, on CUDA: 4 h min(R, 65536) + 2^29, and with more rows the weight's gradient in fp32 (as the kernel
      documents); in plain torch: seven tensors in fp32 of a piece of 2^24 logits; with truncated sampling: eight, and
      in bf16 the gradient of the output matrix in fp32 and that of a piece;
    - stored: the logits, a R v, which the kernel overwrites with the gradient; in plain torch: six more tensors in
      fp32.

    The critic's head has one number per token: a few bytes per response token.
    """
    if role is Role.critic:
        return 16.0 * micro.responses
    a, h, R, v = machine.size, shape.hidden, micro.responses, padded_vocab(shape.vocab, layout.tensor) // layout.tensor
    if logits is Logits.recomputed:
        inputs = 2 * a * R * h + a * v * h
        if machine.cuda and not machine.truncates:
            many = 4 * v * h if R > BLOCK_ROWS else 0
            return inputs + 4 * h * min(R, BLOCK_ROWS) + BLOCK_BYTES + many
        tensors, wide = (8, (4 + a) * v * h if machine.mixed else 0) if machine.truncates else (7, 0)
        return inputs + wide + tensors * 4 * v * min(R, max(1, PIECE // v))
    inputs = a * R * h
    products = a * R * h + a * v * h  # backward through the product; the other tensors are freed
    return inputs + a * R * v + (products if machine.cuda else max(products + 4 * R * v, 6 * 4 * R * v))


def reading(
    shape: ModelShape,
    layout: PlannedLayout,
    machine: PlannedMachine,
    micro: PlannedMicroBatch,
    logits: Logits,
    role: Role,
) -> float:
    """Peak bytes of the head in a pass without gradient, when of the layers only the hidden states remain.

    On CUDA, recomputed: 16 R (shares + 1) bytes of sums. In plain torch: five tensors in fp32 of a piece of the logits,
    or of all. With truncated sampling: six.
    """
    S, a, h = micro.tokens, machine.size, shape.hidden
    sequence = layout.sequence and layout.tensor > 1
    # The stage's input, the hidden states, and the buffer of gathered states.
    states = 2 * a * S * h / (layout.tensor if sequence else 1) + (a * S * h if sequence else 0)
    if role is Role.critic:
        return states + (4 * S * h if machine.mixed else 0) + 16.0 * micro.responses
    R, v = micro.responses, padded_vocab(shape.vocab, layout.tensor) // layout.tensor
    states += a * R * h
    if logits is Logits.stored and machine.cuda:
        return states + a * R * v + 16 * R
    if machine.cuda and not machine.truncates:
        return states + 16 * R * (MOST_SHARES + 1)
    tensors = 6 if machine.truncates else 5
    return states + tensors * 4 * v * (R if logits is Logits.stored else min(R, max(1, PIECE // v)))
