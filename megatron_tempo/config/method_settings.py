"""The built-in methods: which prompts each needs, and the settings that belong to it."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Method(Enum):
    """The stage's method; each is megatron_tempo/methods/NAME.py (docs/methods.md)."""

    ppo = "ppo"  # PPO on verified answers
    tempo = "tempo"  # the critic's values as rewards, the critic trained on verified answers
    ttrl = "ttrl"  # the majority's answer as the label
    ttrl_guard = "ttrl_guard"  # as ttrl, but held back where the majority's answer changes or has lately won
    scrl = "scrl"  # the majority's answer as the label if it is clear, and rare, uncertain answers as wrong
    empo = "empo"  # the share of responses with the same answer as the reward
    grpo = "grpo"  # verified answers, advantages within the prompt group
    intuitor = "intuitor"  # the policy's own certainty as the reward
    entropy_min = "entropy_min"  # the entropy of the policy's tokens as the loss


class Prompts(Enum):
    labelled = "labelled"
    unlabelled = "unlabelled"


@dataclass(frozen=True, slots=True)
class Needs:
    """Which prompts train a method's actor and critic. A critic with other prompts than the actor has an E-step.

    Without a critic, the responses of a prompt group are compared with one another.
    """

    actor: Prompts
    critic: Prompts | None  # None: a method without a critic
    classes: bool = False  # rewards come from which of a prompt's responses have equal answers
    graded: bool = True  # verdicts may lie between 0 and 1; False: only 0 and 1
    extra_pass: bool = False  # rewards take one more pass of the actor, for its entropy or its self-certainty

    @property
    def estep(self) -> bool:
        return self.critic is not None and self.critic is not self.actor


NEEDS = {
    Method.ppo: Needs(actor=Prompts.labelled, critic=Prompts.labelled),
    Method.tempo: Needs(actor=Prompts.unlabelled, critic=Prompts.labelled),
    Method.ttrl: Needs(actor=Prompts.unlabelled, critic=None, classes=True),
    Method.ttrl_guard: Needs(actor=Prompts.unlabelled, critic=None, classes=True),
    Method.scrl: Needs(actor=Prompts.unlabelled, critic=None, classes=True, extra_pass=True),
    Method.empo: Needs(actor=Prompts.unlabelled, critic=None, classes=True),
    Method.grpo: Needs(actor=Prompts.labelled, critic=None),
    Method.intuitor: Needs(actor=Prompts.unlabelled, critic=None, extra_pass=True),
    Method.entropy_min: Needs(actor=Prompts.unlabelled, critic=None),
}


class Baseline(Enum):
    """The values that are the reward and the baseline of a token's advantage (docs/method.md)."""

    before_token = "before_token"  # `A_t = V(x, y_1:T) - V(x, y_<t)`
    paper = "paper"  # `A_t = V(x, y_1:T) - V(x, y_1:t)`, Eq. 11 to the letter
    reference = "reference"  # `A_t = V(x, y_<T) - V(x, y_<t)`, the published code


class ValueTiming(Enum):
    """Which critic judges the M-step's responses."""

    after_estep = "after_estep"  # the recalibrated one, as in the paper
    before_estep = "before_estep"  # the one of the previous iteration, as in the published code


@dataclass(slots=True)
class MethodSettings:
    """The settings of a stage that belong to its method: each method has a subclass with fields.

    The program reads the properties of any method. A field of the same name overrides them.
    """

    @property
    def baseline(self) -> Baseline:
        """The values in a token's advantage."""
        return Baseline.before_token

    @property
    def gae_lambda(self) -> float:
        """The lambda of the lambda-return in a token's advantage; 1: the reward."""
        return 1.0

    @property
    def pass_at_k(self) -> int:
        """Responses to a prompt of which the best counts; 1: each counts for itself."""
        return 1

    @property
    def estep_every(self) -> int:
        """Iterations between E-steps; 0: never."""
        return 1

    @property
    def estep_when_ece_above(self) -> float | None:
        """An E-step is left out unless the calibration error is above this; None: none is left out."""
        return None

    @property
    def actor_on_labelled(self) -> bool:
        """Whether the actor is also trained on labelled prompts, if the method trains it on unlabelled ones."""
        return False

    @property
    def vote_responses(self) -> int | None:
        """Responses to sample for a prompt; None: `responses_per_prompt`."""
        return None


@dataclass(slots=True)
class CriticSettings(MethodSettings):
    """Settings of methods with a critic."""

    baseline: Baseline = Baseline.before_token
    # below 1: advantages are of lambda-returns, between the critic's next value (0) and the reward (1)
    gae_lambda: float = 1.0
    # above 1: the actor is trained for the best of this many responses to a prompt
    pass_at_k: int = 1


@dataclass(slots=True)
class GroupSettings(MethodSettings):
    """Settings of methods that compare the responses of a prompt group."""

    group_std: bool = True  # divide advantages by the standard deviation of the rewards of a prompt


@dataclass(slots=True)
class PpoSettings(CriticSettings):
    """Of a stage with `method=ppo`."""


@dataclass(slots=True)
class TempoSettings(CriticSettings):
    """Of a stage with `method=tempo`."""

    value_timing: ValueTiming = ValueTiming.after_estep
    estep_every: int = 1  # iterations between E-steps; 0: never, the critic is frozen
    # an E-step only if the calibration error on the labelled responses, before it, is above this; None: always
    estep_when_ece_above: float | None = None
    # above 0: the reward is the mean of the critic's values before and after the E-step, less this many of their
    # standard deviations; 1: the lower one
    pessimism: float = 0.0
    # also train the actor on labelled rows with verified rewards, as in the published code
    actor_on_labelled: bool = False


@dataclass(slots=True)
class VoteSettings(GroupSettings):
    """Settings of methods in which the responses to a prompt vote on its label."""

    vote_responses: int | None = None  # responses to a prompt that vote; None: those that are trained on


@dataclass(slots=True)
class TtrlSettings(VoteSettings):
    """Of a stage with `method=ttrl`."""


@dataclass(slots=True)
class GuardSettings(VoteSettings):
    """Of a stage with `method=ttrl_guard`. The defaults are those of the published runs."""

    flip_window: int = 5  # visits over which flips and agreement are averaged (W)
    flip_threshold: float = 0.3  # above this Flip Rate an answer is contested
    agreement_threshold: float = 0.6  # above this share of the majority a question is taken as confident
    flip_penalty: float = 0.5  # by how much a Flip Rate of 1 lowers a question's weight (lambda_1)
    confident_penalty: float = (
        0.3  # and confidence while it flips; half of it: confidence that never flipped (lambda_2)
    )
    least_weight: float = 0.1  # the least weight of a question
    minority_weight: float = 0.3  # greatest weight of the answers of a minority (beta_max)
    minority_share: float = 0.25  # least share of the votes of such an answer
    calm_visits: int = 3  # visits without a high Flip Rate after which minorities have no weight (T_steady)
    risk_threshold: float = 0.5  # above this mean share, a question that was contested is risky (theta_MR)
    skip_probability: float = 0.7  # with which a risky question is left out
    skipped_share: float = 0.25  # the most questions of an iteration that are left out, but at least one


@dataclass(slots=True)
class ScrlSettings(VoteSettings):
    """Of a stage with `method=scrl`. The defaults are the paper's."""

    positive_share: float = 0.375  # least share of the votes with which the majority's answer becomes the label
    positive_margin: float = 0.125  # and by how much more than this the share must exceed the second answer's
    negative_share: float = 0.125  # answers with a smaller share than this, if they are uncertain, are taken as wrong
    entropy_penalty: float = 0.1  # weight of an answer's mean entropy, less the prompt's, in nats a token


@dataclass(slots=True)
class EmpoSettings(GroupSettings):
    """Of a stage with `method=empo`."""

    entropy_low: float | None = None  # drop prompts whose answers have less entropy, in nats; None: no bound
    entropy_high: float | None = None  # drop prompts whose answers have more entropy, in nats; None: no bound


@dataclass(slots=True)
class GrpoSettings(GroupSettings):
    """Of a stage with `method=grpo`."""


@dataclass(slots=True)
class IntuitorSettings(GroupSettings):
    """Of a stage with `method=intuitor`."""


@dataclass(slots=True)
class EntropyMinSettings(MethodSettings):
    """Of a stage with `method=entropy_min`."""


SETTINGS: dict[Method, type[MethodSettings]] = {
    Method.ppo: PpoSettings,
    Method.tempo: TempoSettings,
    Method.ttrl: TtrlSettings,
    Method.ttrl_guard: GuardSettings,
    Method.scrl: ScrlSettings,
    Method.empo: EmpoSettings,
    Method.grpo: GrpoSettings,
    Method.intuitor: IntuitorSettings,
    Method.entropy_min: EntropyMinSettings,
}
