"""What a stage of training is: its method, whose responses actor and critic learn from, and how they are updated."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum


class Method(Enum):
    """The training methods; each is megatron_tempo/methods/NAME.py."""

    ppo = "ppo"  # PPO on verified answers
    tempo = "tempo"
    ttrl = "ttrl"  # the majority's answer as the label
    empo = "empo"  # the share of responses with the same answer as the reward
    grpo = "grpo"  # verified answers, a prompt's responses held against one another


class Prompts(Enum):
    labelled = "labelled"
    unlabelled = "unlabelled"


@dataclass(frozen=True, slots=True)
class Needs:
    """Which prompts a method's actor and critic learn from. A critic with prompts of its own has an E-step.

    Without a critic a prompt's responses are held against one another.
    """

    actor: Prompts
    critic: Prompts | None  # none: a method without a critic
    classes: bool = False  # rewards come from which of a prompt's responses have equal answers

    @property
    def estep(self) -> bool:
        return self.critic is not None and self.critic is not self.actor


NEEDS = {
    Method.ppo: Needs(actor=Prompts.labelled, critic=Prompts.labelled),
    Method.tempo: Needs(actor=Prompts.unlabelled, critic=Prompts.labelled),
    Method.ttrl: Needs(actor=Prompts.unlabelled, critic=None, classes=True),
    Method.empo: Needs(actor=Prompts.unlabelled, critic=None, classes=True),
    Method.grpo: Needs(actor=Prompts.labelled, critic=None),
}


class Baseline(Enum):
    """Where reward and baseline of a token's advantage are read (docs/method.md has the table)."""

    before_token = "before_token"  # A_t = V(x, y_1:T) - V(x, y_<t)
    paper = "paper"  # Eq. 11 to the letter: A_t = V(x, y_1:T) - V(x, y_1:t)
    reference = "reference"  # the published code: A_t = V(x, y_<T) - V(x, y_<t)


class ValueTiming(Enum):
    after_estep = "after_estep"  # the paper: the recalibrated critic judges the M-step's responses
    before_estep = "before_estep"  # the published code


class CriticTargets(Enum):
    zero_one = "zero_one"  # the paper: I in {0, 1}
    plus_minus_one = "plus_minus_one"  # the published code: I in {-1, 1}


class Ratio(Enum):
    sequence = "sequence"  # GSPO: the geometric mean of the tokens' ratios
    token = "token"  # PPO


@dataclass(slots=True)
class OptimizerConfig:
    lr: float = 1e-6
    warmup_steps: int = 0  # linear, from lr / warmup_steps
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    clip_grad: float = 1.0


@dataclass(slots=True)
class ActorUpdateConfig:
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    mini_batch_prompts: int = 64
    epochs: int = 1
    ratio: Ratio = Ratio.sequence
    clip_low: float = 3e-4  # the ratio is clipped to [1 - clip_low, 1 + clip_high]
    clip_high: float = 5e-4
    dual_clip: float | None = None  # bound on ratio * |A| for A < 0, > 1 (Ye et al. 2020)
    importance_cap: float | None = None  # weigh tokens by min(pi_old / pi_engine, cap) (Yao et al. 2025); none: by 1
    entropy_coef: float = 0.0  # bonus, per token, nats
    kl_coef: float = 0.0  # k3 estimate of KL(pi || reference) per token; the reference is model.path
    whiten_advantages: bool = False


@dataclass(slots=True)
class CriticUpdateConfig:
    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(lr=5e-6))
    mini_batch_prompts: int = 64
    epochs: int = 1
    warmup_iterations: int = 0  # iterations at the stage's start that update the critic alone
    targets: CriticTargets = CriticTargets.zero_one
    clip: float | None = None  # how far a response's mean value may move before the loss holds on to it; none: freely
    drop_uniform_groups: bool = False  # leave out prompts whose responses are all right or all wrong


@dataclass(slots=True)
class StageConfig:
    """One stage of training by one method. A stage of 0 iterations is passed over."""

    method: Method = Method.tempo
    iterations: int = 0
    labelled_prompts: int = 256  # an iteration
    unlabelled_prompts: int = 0  # an iteration
    responses_per_prompt: int = 8
    actor: ActorUpdateConfig = field(default_factory=ActorUpdateConfig)
    critic: CriticUpdateConfig = field(default_factory=CriticUpdateConfig)
    baseline: Baseline = Baseline.before_token
    value_timing: ValueTiming = ValueTiming.after_estep
    estep_every: int = 1  # iterations from one E-step to the next; 0: never, a frozen critic
    actor_on_labelled: bool = False  # the published code: labelled rows, with verified rewards, in the actor's batch
    group_std: bool = True  # without a critic: advantages are divided by the standard deviation of a prompt's rewards
    vote_responses: int | None = None  # ttrl: responses a prompt that vote; none: the responses_per_prompt learnt from
    entropy_low: float | None = None  # empo: prompts whose answers' entropy, in nats, is not between the two are left
    entropy_high: float | None = None  # out; none: no bound

    @property
    def has_critic(self) -> bool:
        return NEEDS[self.method].critic is not None

    @property
    def trains_critic(self) -> bool:
        return self.has_critic and not (NEEDS[self.method].estep and self.estep_every == 0)

    @property
    def samples(self) -> int:
        """Responses that are sampled for a prompt."""
        return self.vote_responses or self.responses_per_prompt

    def warms_up(self, iteration: int) -> bool:
        """Whether the iteration, from 0, is of the critic's warm-up: the actor then stays as it is."""
        return iteration < self.critic.warmup_iterations

    def critic_learns(self, iteration: int) -> bool:
        """Whether the iteration, from 0, updates the critic."""
        if not self.trains_critic:
            return False
        return not NEEDS[self.method].estep or self.warms_up(iteration) or iteration % self.estep_every == 0

    def prompts_at(self, iteration: int) -> set[Prompts]:
        """The prompts that the iteration, from 0, needs answered."""
        actor = set() if self.warms_up(iteration) else self.actor_prompts()
        return actor | (self.critic_prompts() if self.critic_learns(iteration) else set())

    def actor_prompts(self) -> set[Prompts]:
        """The prompts whose responses the actor learns from."""
        extra = {Prompts.labelled} if self.actor_on_labelled else set()
        return {NEEDS[self.method].actor} | extra

    def critic_prompts(self) -> set[Prompts]:
        """The prompts whose responses the critic learns from: none where it is frozen or absent."""
        critic = NEEDS[self.method].critic
        return {critic} if critic is not None and self.trains_critic else set()

    def prompts(self) -> set[Prompts]:
        """All prompts that an iteration needs."""
        return self.actor_prompts() | self.critic_prompts()

    def count(self, prompts: set[Prompts]) -> int:
        """How many of the given prompts an iteration has."""
        of = {Prompts.labelled: self.labelled_prompts, Prompts.unlabelled: self.unlabelled_prompts}
        return sum(of[kind] for kind in prompts)
