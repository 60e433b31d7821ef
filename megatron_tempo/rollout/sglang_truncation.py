"""Top-p, top-k and min-p as a logit processor of SGLang, for its servers.

This file and `kernels/truncation.py` are copied into a server's folder (`sglang.py`). They run in SGLang's environment
and import nothing of the package. SGLang calls a processor with the logits before temperature.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

try:
    from megatron_tempo_truncation import Truncation, lowest_kept  # type: ignore[import-not-found]
except ImportError:  # in the trainer's environment, where tests call it
    from megatron_tempo.kernels.truncation import Truncation, lowest_kept


class TruncationProcessor:
    """Gives tokens that a request's `custom_params` do not leave a logit of -inf."""

    def __call__(self, logits: Tensor, custom_param_list: list[dict[str, Any]] | None = None) -> Tensor:
        """`logits`: [rows, vocabulary]; each row with its own parameters. Returns them, changed."""
        rows_of: dict[tuple[float, ...], list[int]] = {}
        for row, of in enumerate(custom_param_list or []):
            settings = (float(of["temperature"]), float(of["top_p"]), int(of["top_k"]), float(of["min_p"]))
            rows_of.setdefault(settings, []).append(row)
        for (temperature, top_p, top_k, min_p), rows in rows_of.items():
            everything = len(rows) == len(logits)
            x = (logits if everything else logits[rows]).float()
            least = lowest_kept(x, temperature, Truncation(top_p, int(top_k) or None, min_p))
            kept = x.masked_fill(x < least[:, None], -torch.inf).to(logits.dtype)
            if everything:
                return kept
            logits[rows] = kept
        return logits
