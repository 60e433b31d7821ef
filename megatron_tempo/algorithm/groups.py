"""Functions of a prompt group: votes, shares of equal answers, and advantages without a critic.

`classes` [n] says which responses of a prompt have equal answers: the numbers count within a prompt, from 0 in the
order of first appearance, -1 is a response without an answer. `group` [n] says which rows answer the same prompt.
"""

from __future__ import annotations

import torch
from torch import Tensor

EPS = 1e-6


def group_advantages(rewards: Tensor, group: Tensor, *, divide: bool) -> Tensor:
    """(r_i - mean) / (std + 1e-6) over a prompt's responses (GRPO, arXiv 2402.03300, 4.1.2). [n] -> float32 [n]

    The standard deviation is the unbiased one, over N - 1 responses; the paper leaves that open. A prompt whose rewards
    are all the same gets zeros. Without `divide` r_i - mean alone (Dr. GRPO, arXiv 2503.20783).
    """
    place, size = _groups(group)
    exact = rewards.double()
    away = exact - (_sum(exact, place, size) / size)[place]
    if divide:
        variance = _sum(away.square(), place, size) / (size - 1).clamp(min=1)
        away = away / (variance.sqrt()[place] + EPS)
    return away.float()


def votes(classes: Tensor, group: Tensor) -> tuple[Tensor, Tensor]:
    """Who is with the majority, float32 [n] in {0, 1}, and its share of each prompt's responses, float32 [prompts].

    Of classes of the same size the one that appeared first wins. A response without an answer never does; where none
    has one, all lose.
    """
    place, size = _groups(group)
    counts = _counts(classes, place, len(size))
    winner = counts.argmax(1)  # of equals the first
    won = (classes >= 0) & (classes == winner[place])
    return won.float(), (counts.amax(1) / size).float()


def shares(classes: Tensor, group: Tensor) -> tuple[Tensor, Tensor]:
    """The share of a prompt's responses that are in a response's class, and the entropy of these shares, in nats.

    A response without an answer is a class of its own. [n], [n] -> float32 [n], and float32 [n]: that of its prompt
    """
    place, size = _groups(group)
    counts = _counts(classes, place, len(size))
    own = torch.where(classes >= 0, counts[place, classes.clamp(min=0)], 1.0) / size[place]
    # -sum_c p_c log p_c, the sum taken over responses: a class c has p_c N of them, of 1 / N each.
    entropy = _sum(-own.log(), place, size) / size
    return own.float(), entropy.clamp(min=0.0)[place].float()


def first_of_each(group: Tensor, count: int) -> Tensor:
    """Row numbers, int64, of the first `count` rows of each prompt, in their order."""
    seen: dict[int, int] = {}
    chosen = []
    for row, prompt in enumerate(group.tolist()):
        seen[prompt] = seen.get(prompt, 0) + 1
        if seen[prompt] <= count:
            chosen.append(row)
    return torch.tensor(chosen, dtype=torch.int64)


def _groups(group: Tensor) -> tuple[Tensor, Tensor]:
    """Each row's prompt, counted from 0: int64 [n]; how many rows each prompt has: float64 [prompts]."""
    _, place, size = group.unique(return_inverse=True, return_counts=True)
    return place, size.double()


def _sum(flat: Tensor, place: Tensor, size: Tensor) -> Tensor:
    return torch.zeros_like(size).index_add(0, place, flat)


def _counts(classes: Tensor, place: Tensor, prompts: int) -> Tensor:
    """Responses of each prompt in each class: float64 [prompts, classes], one class at least."""
    width = max(int(classes.max()) + 1, 1) if len(classes) else 1
    counts = torch.zeros(prompts, width, dtype=torch.float64)
    answered = classes >= 0
    one = torch.ones(int(answered.sum()), dtype=torch.float64)
    return counts.index_put((place[answered], classes[answered]), one, accumulate=True)
