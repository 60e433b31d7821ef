"""Functions of a prompt group: votes, shares of equal answers, and advantages without a critic.

`classes` [n]: responses of a prompt group with equal numbers have equal answers. Within a group the numbers count from
0 in the order of first appearance. -1 is a response without an answer. `group` [n]: the prompt group of each row.
"""

from __future__ import annotations

import torch
from torch import Tensor

EPS = 1e-6


def group_advantages(rewards: Tensor, group: Tensor, *, divide: bool) -> Tensor:
    """(r_i - mean) / (std + 1e-6) over a prompt group (GRPO, arXiv 2402.03300, 4.1.2). [n] -> float32 [n]

    The standard deviation is unbiased: it divides by N - 1. The paper does not say which one it uses. A group whose
    rewards are all equal gets zeros. Without `divide`: r_i - mean (Dr. GRPO, arXiv 2503.20783).
    """
    prompt, size = _groups(group)
    exact = rewards.double()
    deviation = exact - (_sum(exact, prompt, size) / size)[prompt]
    if divide:
        variance = _sum(deviation.square(), prompt, size) / (size - 1).clamp(min=1)
        deviation = deviation / (variance.sqrt()[prompt] + EPS)
    return deviation.float()


def votes(classes: Tensor, group: Tensor) -> tuple[Tensor, Tensor]:
    """Votes for the majority: float32 [n] in {0, 1}. The majority's share of each prompt group: float32 [prompts].

    Of classes of the same size, the one that appeared first wins. A response without an answer gets 0. If no response
    of a group has an answer, all of them get 0.
    """
    prompt, size = _groups(group)
    counts = _counts(classes, prompt, len(size))
    winner = counts.argmax(1)  # the first of equal counts
    won = (classes >= 0) & (classes == winner[prompt])
    return won.float(), (counts.amax(1) / size).float()


def minorities(classes: Tensor, group: Tensor, share: float) -> Tensor:
    """Responses whose answer is not the majority's, with at least `share` of their group's votes: float32 [n].

    1 or 0. The majority is that of `votes`.
    """
    prompt, size = _groups(group)
    counts = _counts(classes, prompt, len(size))
    own = counts[prompt, classes.clamp(min=0)]
    return ((classes >= 0) & (classes != counts.argmax(1)[prompt]) & (own >= share * size[prompt])).float()


def shares(classes: Tensor, group: Tensor) -> tuple[Tensor, Tensor]:
    """The share of each response's class in its prompt group, and the entropy of the group's shares, in nats.

    A response without an answer is a class of its own. [n], [n] -> float32 [n], float32 [n]
    """
    prompt, size = _groups(group)
    counts = _counts(classes, prompt, len(size))
    own = torch.where(classes >= 0, counts[prompt, classes.clamp(min=0)], 1.0) / size[prompt]
    # -sum_c p_c log p_c, as a sum over responses: a class c has p_c N responses, with weight 1 / N each.
    entropy = _sum(-own.log(), prompt, size) / size
    return own.float(), entropy.clamp(min=0.0)[prompt].float()


def pseudo_labels(
    classes: Tensor, group: Tensor, entropy: Tensor, *, positive: float, margin: float, negative: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Clear majorities, and answers that are rare and uncertain (SCRL, arXiv 2603.19880). Four tensors [n].

    Of the n responses whether the answer is its prompt's label, bool; whether it is taken as wrong, bool; the answer's
    share, float64; the mean entropy of its answer's responses less that of the prompt's, float64. Responses without an
    answer are a class of their own, which is neither.

    Args:
        classes, group: int64 [n].
        entropy: [n], mean entropy of each response's tokens.
        positive, margin: a label has this share of the prompt's responses or more, and exceeds the second by more than
            `margin`.
        negative: answers with a share below this are rare; those of at least the prompt's mean entropy are uncertain.
    """
    prompt, size = _groups(group)
    counts = _counts(classes + 1, prompt, len(size))  # column 0: no answer
    sums = torch.zeros_like(counts).index_put((prompt, classes + 1), entropy.double(), accumulate=True)
    excess = sums / counts.clamp(min=1) - (sums.sum(1) / size)[:, None]
    answers = torch.cat([counts[:, 1:], torch.zeros(len(size), 2, dtype=torch.float64)], dim=1)
    (first, second), winner = answers.topk(2).values.unbind(1), answers.argmax(1)  # the first of equal counts
    clear = (first > 0) & (first >= positive * size) & (first - second > margin * size)
    right = clear[prompt] & (classes == winner[prompt])
    rare = counts < negative * size[:, None]
    wrong = (rare & (excess >= -EPS))[prompt, classes + 1] & (classes >= 0) & ~right
    return right, wrong, counts[prompt, classes + 1] / size[prompt], excess[prompt, classes + 1]


def agreeing(labels: Tensor, group: Tensor, groups: int) -> Tensor:
    """Whether all rows of each group have the same label, a verdict or a class: [n], [n] -> bool [groups].

    A group without rows agrees.
    """
    exact = labels.double()
    low = torch.full((groups,), torch.inf, dtype=torch.float64).scatter_reduce(0, group, exact, "amin")
    high = torch.full((groups,), -torch.inf, dtype=torch.float64).scatter_reduce(0, group, exact, "amax")
    return low >= high


def first_of_each(group: Tensor, count: int) -> Tensor:
    """Indices, int64, of the first `count` rows of each prompt group, in ascending order."""
    seen: dict[int, int] = {}
    chosen = []
    for row, prompt in enumerate(group.tolist()):
        seen[prompt] = seen.get(prompt, 0) + 1
        if seen[prompt] <= count:
            chosen.append(row)
    return torch.tensor(chosen, dtype=torch.int64)


def _groups(group: Tensor) -> tuple[Tensor, Tensor]:
    """The index of each row's prompt, from 0: int64 [n]. The number of rows of each prompt: float64 [prompts]."""
    _, prompt, size = group.unique(return_inverse=True, return_counts=True)
    return prompt, size.double()


def _sum(flat: Tensor, prompt: Tensor, size: Tensor) -> Tensor:
    return torch.zeros_like(size).index_add(0, prompt, flat)


def _counts(classes: Tensor, prompt: Tensor, prompts: int) -> Tensor:
    """Number of responses of each prompt in each class: float64 [prompts, classes], at least one class."""
    width = max(int(classes.max()) + 1, 1) if len(classes) else 1
    counts = torch.zeros(prompts, width, dtype=torch.float64)
    answered = classes >= 0
    one = torch.ones(int(answered.sum()), dtype=torch.float64)
    return counts.index_put((prompt[answered], classes[answered]), one, accumulate=True)
