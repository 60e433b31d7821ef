"""Self-certainty from hidden states against its formula over all logits in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from megatron_tempo.kernels import self_certainty as module
from megatron_tempo.kernels.self_certainty import self_certainty
from tests.kernels.implementations import Implementation
from tests.kernels.test_logprobs import close, linear_case


def wanted_certainty(hidden: Tensor, weight: Tensor, vocab: int, temperature: float) -> Tensor:
    """-1/V sum_j log(V p_j), from the paper: -log V less the mean of log p_j."""
    logits = (hidden.double() @ weight.double().T)[:, :vocab] / temperature
    return -math.log(vocab) - logits.log_softmax(1).mean(1)


def certainty(
    implementation: Implementation, hidden: Tensor, weight: Tensor, vocab: int, temperature: float = 1.0
) -> Tensor:
    given = implementation(hidden), implementation(weight)
    return self_certainty(*given, vocab, temperature, None, implementation.kernels.linear_logprobs_and_entropy)


def test_by_hand(implementation: Implementation) -> None:
    """p = 3/4 1/4: -1/2 (log 3/2 + log 1/2) = 1/2 log 4/3. At temperature 1/2, p = 9/10 1/10: 1/2 log 25/9.

    Of equal logits it is 0. The third row of the weights is padding.
    """
    weight = torch.zeros(3, 8)
    weight[0, 0], weight[2, 1] = math.log(3.0), 100.0
    hidden = torch.zeros(2, 8)
    hidden[0, 0] = hidden[:, 1] = 1.0
    close(certainty(implementation, hidden, weight, 2), torch.tensor([math.log(4 / 3) / 2, 0.0]))
    close(certainty(implementation, hidden, weight, 2, 0.5), torch.tensor([math.log(25 / 9) / 2, 0.0]))


@pytest.mark.parametrize("spread", [0.1, 1.0, 15.0])
@pytest.mark.parametrize(("rows", "vocab", "padded"), [(6, 11, 14), (1, 1, 1), (65, 800, 800)])
def test_it_is_that_of_float64(
    implementation: Implementation, rows: int, vocab: int, padded: int, spread: float
) -> None:
    """Also where the first token has no probability in float32."""
    hidden, weight, _ = linear_case(rows, vocab, padded)
    actual = certainty(implementation, spread * hidden, weight, vocab, 0.7)
    wanted = wanted_certainty(spread * hidden, weight, vocab, 0.7)
    assert not actual.requires_grad
    torch.testing.assert_close(actual.cpu().double(), wanted, rtol=3e-6, atol=3e-6 * max(1.0, spread))


def test_pieces_of_the_weights_add_up(monkeypatch: pytest.MonkeyPatch, implementation: Implementation) -> None:
    hidden, weight, _ = linear_case(5, 40, 41)
    monkeypatch.setattr(module, "PIECE", 3 * weight.shape[1])
    close(certainty(implementation, hidden, weight, 40), wanted_certainty(hidden, weight, 40, 1.0))
