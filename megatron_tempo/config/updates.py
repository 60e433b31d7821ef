"""How actor and critic are updated on an iteration's responses: optimizer, mini-batches, clip ranges, coefficients."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from megatron_tempo.config.correction import CorrectionConfig


class CriticTargets(Enum):
    """The critic's targets for wrong and right verdicts."""

    zero_one = "zero_one"  # 0 and 1, as in the paper
    plus_minus_one = "plus_minus_one"  # -1 and 1, as in the published code


class Ratio(Enum):
    """Which importance ratio is clipped."""

    sequence = "sequence"  # a response's, the geometric mean of its tokens' (GSPO)
    token = "token"  # each token's (PPO)


class KlReference(Enum):
    """The policy that the KL term holds the actor to."""

    model = "model"  # the one in model.path
    start = "start"  # the one with which the stage starts


@dataclass(slots=True)
class OptimizerConfig:
    """AdamW, by Megatron's distributed optimizer."""

    lr: float = 1e-6  # learning rate, constant after the warm-up
    warmup_steps: int = 0  # optimizer steps in which the learning rate rises from lr / warmup_steps, linearly
    weight_decay: float = 0.0  # decoupled, of matrices alone
    beta1: float = 0.9  # decay of the gradient's running mean
    beta2: float = 0.999  # decay of the running mean of its square
    eps: float = 1e-8  # added to the square root of that mean
    clip_grad: float = 1.0  # maximum norm of the gradient over all parameters


@dataclass(slots=True)
class ActorUpdateConfig:
    """How the actor is trained on an iteration's responses."""

    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    mini_batch_prompts: int = 64  # prompts, with all their responses, of one optimizer step
    epochs: int = 1  # passes over the iteration's batch
    ratio: Ratio = Ratio.sequence
    clip_low: float = 3e-4  # the ratio is clipped at 1 - clip_low
    clip_high: float = 5e-4  # the ratio is clipped at 1 + clip_high
    # above 1: the upper bound of the ratio where A < 0 (Ye et al. 2020); None: no bound
    dual_clip: float | None = None
    correction: CorrectionConfig = field(default_factory=CorrectionConfig)
    entropy_coef: float = 0.0  # weight of the entropy bonus, in nats per token
    # the weight falls in proportion as the entropy rises from 0 to this, in nats per token; None: it is constant
    entropy_target: float | None = None
    # weight of KL(pi || the reference policy), in nats per token, k3 estimate; above 0: a third model is in memory
    kl_coef: float = 0.0
    kl_reference: KlReference = KlReference.model
    whiten_advantages: bool = False  # normalise advantages to mean 0 and variance 1 over the tokens of an iteration


@dataclass(slots=True)
class CriticUpdateConfig:
    """How the critic is trained on an iteration's responses."""

    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(lr=5e-6))
    mini_batch_prompts: int = 64  # prompts, with all their responses, of one optimizer step
    epochs: int = 1  # passes over the iteration's batch
    warmup_iterations: int = 0  # number of iterations, the stage's first, that update only the critic
    targets: CriticTargets = CriticTargets.zero_one
    # clip range of a response's mean value in an update; None: no clipping
    clip: float | None = None
    drop_uniform_groups: bool = False  # drop prompts whose responses are all right or all wrong
