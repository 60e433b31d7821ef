"""The weight of the entropy bonus."""

from __future__ import annotations


def entropy_weight(entropy: float, coef: float, target: float | None) -> float:
    """The weight of an update's entropy bonus: `coef` at an entropy of 0, falling linearly to 0 at `target` and above.

    `entropy`: nats per token, of the policy before the update. It is computed again for each update, so a resumed run
    needs no state of it. The entropy settles below the target, where the bonus balances what lowers it.
    """
    return coef if target is None else coef * max(0.0, 1.0 - entropy / target)
