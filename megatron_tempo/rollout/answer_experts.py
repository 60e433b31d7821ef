"""The experts in servers' answers, in the form in which they are stored (`config.routing`). No torch.

Both engines return the experts of all tokens but the last sampled one, which has not passed the model yet, in all
layers. SGLang returns int32, vLLM a NumPy file of uint8 or uint16. NumPy is imported where there are experts only.
"""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

import msgspec

if TYPE_CHECKING:
    from numpy.typing import NDArray

# Tokens of a response whose experts are compared with one another. An engine that has not recorded a token returns the
# same expert k times.
_COMPARED = 64


class RoutingForm(msgspec.Struct, array_like=True, frozen=True):
    """A `config.routing.RoutingFormat`. The process that reads answers does not import the configuration."""

    layers: int
    per_token: int
    experts: int
    itemsize: int


def from_sglang(raw: bytes, form: RoutingForm) -> tuple[int, bytes]:
    """SGLang 0.5.23 (`srt/state_capturer`): int32, without a shape. See `_stored`."""
    import numpy as np

    if len(raw) % (4 * form.layers * form.per_token):
        raise ValueError(f"{len(raw)} bytes of experts, not a multiple of {form.layers} layers * {form.per_token} * 4")
    return _stored(np.frombuffer(raw, np.int32).reshape(-1, form.layers, form.per_token), form)


def from_npy(raw: bytes, form: RoutingForm) -> tuple[int, bytes]:
    """vLLM 0.32 (`utils/serial_utils.py`, `numpy2base64`): an array [tokens, layers, k]. See `_stored`."""
    import numpy as np

    return _stored(np.load(io.BytesIO(raw), allow_pickle=False), form)


def _stored(experts: NDArray[Any], form: RoutingForm) -> tuple[int, bytes]:
    """The number of tokens, and their experts. Raises ValueError for what no router chooses."""
    import numpy as np

    if experts.dtype.kind not in "iu" or experts.ndim != 3 or experts.shape[1:] != (form.layers, form.per_token):
        raise ValueError(
            f"experts of shape {list(experts.shape)} ({experts.dtype}), not [tokens, {form.layers}, {form.per_token}]"
        )
    if experts.size:
        least, most = int(experts.min()), int(experts.max())
        if not 0 <= least <= most < form.experts:
            raise ValueError(f"experts from {least} to {most} in a model that has {form.experts}")
        chosen = np.sort(experts[:: -(-len(experts) // _COMPARED)], axis=-1)
        if (chosen[..., 1:] == chosen[..., :-1]).any():
            raise ValueError("a token with the same expert twice: the server has not recorded its experts")
    return len(experts), experts.astype(np.uint8 if form.itemsize == 1 else np.int16).tobytes()
