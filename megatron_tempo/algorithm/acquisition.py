"""Which questions to label: the corrective advantage gap, and the choice by its expectation (RLAVR, arXiv 2605.25864).

For the n responses to a question let r_i = 1 if response i has the majority's answer, and r*_i = 1 if it is correct:

    A(r)_i = (r_i - mean(r)) / std(r),  0 if all r_i are equal;   std over n
    CAG = || A(r) - A(r*) ||_2

A label is worth much where training on the majority's answer would push responses another way than the label does.
The gap needs the label. It depends on three counts: n, the x responses of the majority, and, if the majority is wrong,
the y correct ones. So CARE predicts whether the majority is right, and y:

    expected gap = sum_y P(y) CAG(n, x, y)
    leave out the share `gate` of the questions whose majority is most likely right; label the greatest of the rest

CAG(n, x, y) needs no vectors: A(r) and A(r*) have the length sqrt(n), or 0 if all agree, and with p = x/n, q = y/n the
correlation of two disjoint sets is -sqrt(p q / ((1 - p) (1 - q))).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def advantage_gaps(pseudo: Tensor, verified: Tensor) -> Tensor:
    """CAG of each question, which needs its label. Rewards under both labels: [questions, n] -> float64 [questions]."""
    return (_advantages(pseudo) - _advantages(verified)).norm(dim=1)


def gap_of_counts(n: int, majority: Tensor, correct: Tensor) -> Tensor:
    """CAG(n, x, y): of `majority` responses with a wrong answer and `correct` others with the right one. float64."""
    p, q = majority.double() / n, correct.double() / n
    varied, other = (p > 0) & (p < 1), (q > 0) & (q < 1)
    both = torch.where(varied & other, (p * q / ((1 - p) * (1 - q)).clamp(min=1e-300)).sqrt(), 0.0)
    return (n * (varied.double() + other.double() + 2 * both)).sqrt()


def class_counts(classes: Tensor) -> Tensor:
    """The responses of each question in each class: [questions, n], -1: no answer, -> float64 [questions, classes]."""
    answers = range(max(1, int(classes.max()) + 1))
    return torch.stack([(classes == number).sum(1) for number in answers], dim=1).double()


def expected_gaps(classes: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """The expected CAG of each question, and the probability that its majority is right: float64 [questions] each.

    Args:
        classes: int64 [questions, n], as in `groups`: the majority is the first of the largest classes.
        right: float64 [questions, classes], the probability that a class has the right answer. The sum over a
            question's classes is at most 1: perhaps no response is right.
    """
    counts, n = class_counts(classes), classes.shape[1]
    majority, winner = counts.max(1, keepdim=True)
    right = right.double() * (counts > 0)
    of_majority = right.gather(1, winner)
    others = right.scatter(1, winner, 0.0)
    none = (1 - right.sum(1, keepdim=True)).clamp(min=0.0)
    expected = (others * gap_of_counts(n, majority, counts)).sum(1, keepdim=True)
    expected += none * gap_of_counts(n, majority, torch.zeros_like(majority))
    return expected[:, 0], of_majority[:, 0]


def to_label(scores: Tensor, majority_right: Tensor, budget: int, gate: float) -> Tensor:
    """The questions to label, int64 [budget] in ascending order; the earlier one of equal scores.

    The share `gate` of all questions whose majority is most likely right is taken only if the others are too few.
    """
    count = math.ceil(gate * len(scores) - 1e-9)  # 0.07 * 100 is above 7
    left_out = torch.argsort(-majority_right, stable=True)[:count]
    ranks = scores.double().clone()
    ranks[left_out] -= 1 + scores.max() - scores.min()
    return torch.argsort(-ranks, stable=True)[:budget].sort().values


def class_features(classes: Tensor, lengths: Tensor) -> Tensor:
    """Features that predict whether a class is right: float64 [questions, classes, 4].

    Its share of the responses, 1 if it is the majority, the share of responses with an answer, and the mean length of
    its responses over that of the question's (0 for a class that is empty). `lengths`: [questions, n], in tokens.
    """
    counts, n = class_counts(classes), classes.shape[1]
    winner = torch.zeros_like(counts).scatter(1, counts.argmax(1, keepdim=True), 1.0)
    answered = (classes >= 0).double().mean(1, keepdim=True).expand_as(counts)
    members = torch.stack([(classes == number) * lengths for number in range(counts.shape[1])], dim=1).double()
    relative = members.sum(2) / counts.clamp(min=1) / lengths.double().mean(1, keepdim=True)
    return torch.stack([counts / n, winner, answered, relative], dim=2)


def fit_logistic(features: Tensor, labels: Tensor, ridge: float = 1.0, steps: int = 50) -> Tensor:
    """Weights [f + 1], the last one the constant, of a logistic regression with an L2 term, by Newton's method.

    Minimises sum of the log-losses + ridge / 2 |w|^2. `features`: [m, f], `labels`: [m] in 0 and 1.
    """
    x = torch.cat([features.double(), torch.ones(len(features), 1, dtype=torch.float64)], dim=1)
    weights = torch.zeros(x.shape[1], dtype=torch.float64)
    penalty = ridge * torch.eye(x.shape[1], dtype=torch.float64)
    for _ in range(steps):
        p = (x @ weights).sigmoid()
        slope = x.T @ (p - labels.double()) + penalty @ weights
        weights = weights - torch.linalg.solve((x * (p * (1 - p))[:, None]).T @ x + penalty, slope)
    return weights


def class_probabilities(features: Tensor, counts: Tensor, weights: Tensor) -> Tensor:
    """The probability of each class to be right, at most 1 in sum over a question: [questions, classes]."""
    single = (features @ weights[:-1] + weights[-1]).sigmoid() * (counts > 0)
    return single / single.sum(1, keepdim=True).clamp(min=1.0)


def _advantages(rewards: Tensor) -> Tensor:
    """(r - mean) / std over each row, the standard deviation over n; 0 in rows whose rewards are equal."""
    away = rewards.double() - rewards.double().mean(1, keepdim=True)
    std = away.square().mean(1, keepdim=True).sqrt()
    return torch.where(std > 1e-8, away / std.clamp(min=1e-8), 0.0)
