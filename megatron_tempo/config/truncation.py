"""How responses are treated that are cut off at the limit of tokens."""

from __future__ import annotations

from enum import Enum


class TruncatedResponses(Enum):
    """How a response is treated that `rollout.max_response_tokens` cuts off (docs/methods.md)."""

    wrong = "wrong"  # it is treated as any other: without a readable answer it is wrong
    masked = "masked"  # the actor is not trained on it, and it counts in no prompt group; the critic is fitted to it
    penalised = "penalised"  # rewards fall towards the limit, of all responses alike (`length_penalty_tokens`)
