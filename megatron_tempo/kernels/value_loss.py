"""The E-step's loss: regression of the critic's values on the verified outcome (TEMPO, Eq. 6).

A row of m values v_t and a target R has the loss mean_t (v_t - R)^2 over t = 0 .. T. The value before the first token
is included, because it is a baseline too. So m = T + 1.

The published code clips how far the mean of a row's values moves. With D = mean_t v_t - mean_t v_old_t and the shift
e = clip(D, -c, c) - D, which is 0 within the range,

    loss = mean_t max((v_t - R)^2, (v_t + e - R)^2)

The gradient flows through the mean: outside the range de/dv_j = -1/m for every j. Let K be the values for which the
second term is greater, and S = sum over K of (v_t + e - R). Then

    d loss / d v_j = 2 (v_j + e [j in K] - R) / m  -  2 S / m^2

The kernel needs one launch forward and one backward. A clip needs one more, for D.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_tempo.kernels.rows import Rows

# A row's metrics: the loss, the mean value, and 1 if the row's mean is clipped.
VALUE_METRICS = ("loss", "value", "clip_fraction")


def value_loss(
    values: Tensor, targets: Tensor, rows: Rows, *, clip: float | None = None, old_values: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The loss of each row, to be averaged over the rows of a mini-batch, and the row's metrics.

    Args:
        values: [M].
        targets: [n].
        rows: n rows with M values in total.
        clip: c above, > 0. None: no clip; `old_values` is not used.
        old_values: [M], the values before the update.

    Returns: loss [n] with gradient, metrics [n, len(VALUE_METRICS)] without. An empty row has loss 0.
    """
    error = values - rows.spread(targets)
    losses = error.square()
    clipped = torch.zeros_like(targets)
    if clip is not None:
        assert old_values is not None
        moved = rows.mean(values - old_values)
        shift = moved.clamp(-clip, clip) - moved
        clipped = (moved.detach().abs() > clip).to(values.dtype)
        losses = torch.maximum(losses, (error + rows.spread(shift)).square())
    loss = rows.mean(losses)
    return loss, torch.stack([loss.detach(), rows.mean(values.detach()), clipped], dim=1)
