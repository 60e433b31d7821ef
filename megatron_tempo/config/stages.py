"""A stage of training: its method, whose responses train actor and critic, and how they are updated."""

from __future__ import annotations

from dataclasses import MISSING, dataclass, field, fields
from enum import Enum
from functools import cache
from typing import Any, NamedTuple, TypeVar

from megatron_tempo.config import extensions
from megatron_tempo.config.extensions import Extension, ExtensionError
from megatron_tempo.config.truncation import TruncatedResponses
from megatron_tempo.config.updates import ActorUpdateConfig, CriticUpdateConfig

_Settings = TypeVar("_Settings", bound="MethodSettings")


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
_METHODS = {settings: method for method, settings in SETTINGS.items()}


@dataclass(slots=True)
class ExtensionSettings:
    """A user's method and its settings: plain values, which are read when the method is loaded."""

    method: Extension
    given: dict[str, Any] = field(default_factory=dict)


def settings_of(method: Method | Extension) -> MethodSettings | ExtensionSettings:
    """The default settings of a method.

    >>> settings_of(Method.grpo)
    GrpoSettings(group_std=True)
    """
    return ExtensionSettings(method) if isinstance(method, Extension) else SETTINGS[method]()


class LoadedMethod(NamedTuple):
    """A method of the user's own. `iterate` is called as `methods.Iterate`."""

    needs: Needs
    iterate: Any
    settings: type[MethodSettings]


@cache
def load_method(extension: Extension) -> LoadedMethod:
    """An object with `needs`, `iterate(learner, rollouts, stage, iteration)` and perhaps `settings`.

    Raises ExtensionError.
    """
    target = extensions.load(extension)
    iterate = extensions.method(target, "iterate", ("learner", "rollouts", "stage", "iteration"))
    needs = getattr(target, "needs", None)
    if not isinstance(needs, Needs):
        wrong = f"its attribute needs is {extensions.shown(needs)}"
        raise ExtensionError(
            wrong, "needs = Needs(actor=Prompts.labelled, critic=None), from megatron_tempo.config.stages"
        )
    if not isinstance(needs.actor, Prompts) or not isinstance(needs.critic, Prompts | None):
        raise ExtensionError(
            f"its attribute needs is {needs}", "give actor a member of Prompts, and critic one or None"
        )
    return LoadedMethod(needs, iterate, _settings_class(target))


def _settings_class(target: Any) -> type[MethodSettings]:
    """The settings that a user's method declares. Raises ExtensionError."""
    kind = getattr(target, "settings", MethodSettings)
    if not (isinstance(kind, type) and issubclass(kind, MethodSettings)):
        wrong = f"its attribute settings is {extensions.shown(kind)}"
        raise ExtensionError(wrong, "a dataclass that derives from MethodSettings, of megatron_tempo.config.stages")
    name = kind.__name__
    if "__dataclass_fields__" not in vars(kind):
        raise ExtensionError(f"its settings {name} are no dataclass", "@dataclass(slots=True) above the class")
    taken = {"method", *StageConfig.__dataclass_fields__}
    for each in fields(kind):
        # A field that has the name of a property above takes that for its default.
        if (each.default is MISSING and each.default_factory is MISSING) or isinstance(each.default, property):
            raise ExtensionError(f"its setting {name}.{each.name} has no default", "give each setting a default")
        if each.name in taken:
            raise ExtensionError(f"its setting {name}.{each.name} is a field of every stage", "give it another name")
    return kind


@dataclass(slots=True)
class StageConfig:
    """One stage of training by one method."""

    # the stage's method; its settings are given among these fields (docs/methods.md)
    settings: MethodSettings | ExtensionSettings = field(default_factory=TempoSettings)
    iterations: int = 0  # length of the stage; 0: no such stage
    labelled_prompts: int = 256  # labelled prompts of an iteration
    unlabelled_prompts: int = 0  # unlabelled prompts of an iteration
    responses_per_prompt: int = 8  # responses to a prompt that are trained on
    # the most prompts to ask for an iteration, replacing those whose responses all agree; None: none is replaced
    refill_limit: int | None = None
    truncated_responses: TruncatedResponses = TruncatedResponses.wrong
    # with `truncated_responses=penalised`: the penalty begins this many tokens below the limit
    length_penalty_tokens: int | None = None
    length_penalty: float = 1.0  # what is subtracted from the reward of a response as long as the limit
    actor: ActorUpdateConfig = field(default_factory=ActorUpdateConfig)
    critic: CriticUpdateConfig = field(default_factory=CriticUpdateConfig)

    @property
    def method(self) -> Method | Extension:
        settings = self.settings
        return settings.method if isinstance(settings, ExtensionSettings) else _METHODS[type(settings)]

    @method.setter
    def method(self, method: Method | Extension) -> None:
        """Another method, with its default settings."""
        self.settings = settings_of(method)

    @property
    def method_settings(self) -> MethodSettings:
        """The settings of the method. Raises ExtensionError if it is the user's and cannot be loaded."""
        if not isinstance(self.settings, ExtensionSettings):
            return self.settings
        from megatron_tempo.config.tree import read_settings  # which imports this module

        settings, problems = read_settings(self.settings, "")
        if problems:
            raise ExtensionError(f"{problems[0].field}={problems[0].value}: {problems[0].wrong}", problems[0].fix)
        return settings

    def settings_as(self, kind: type[_Settings]) -> _Settings:
        """The settings of the method, whose class is known to be `kind`."""
        settings = self.method_settings
        assert isinstance(settings, kind), f"the settings of {self.method.name} are {type(settings).__name__}"
        return settings

    def named_fields(self) -> dict[str, Any]:
        """All fields by their names in the configuration: the method, the method's own, those of every stage."""
        settings = self.settings
        given = settings.given if isinstance(settings, ExtensionSettings) else _values(settings)
        return {"method": self.method, **given, **{k: v for k, v in _values(self).items() if k != "settings"}}

    @property
    def needs(self) -> Needs:
        """The method's needs. Raises ExtensionError if it is the user's and cannot be loaded."""
        return load_method(self.method).needs if isinstance(self.method, Extension) else NEEDS[self.method]

    @property
    def has_critic(self) -> bool:
        return self.needs.critic is not None

    @property
    def trains_critic(self) -> bool:
        return self.has_critic and not (self.needs.estep and self.method_settings.estep_every == 0)

    @property
    def samples(self) -> int:
        """Responses to sample for a prompt."""
        return self.method_settings.vote_responses or self.responses_per_prompt

    def warms_up(self, iteration: int) -> bool:
        """Whether the iteration, from 0, is in the critic's warm-up, which does not update the actor."""
        return iteration < self.critic.warmup_iterations

    def critic_learns(self, iteration: int) -> bool:
        """Whether the iteration, from 0, updates the critic; with `estep_when_ece_above`, whether it may."""
        if not self.trains_critic:
            return False
        return not self.needs.estep or self.warms_up(iteration) or iteration % self.method_settings.estep_every == 0

    def prompts_at(self, iteration: int) -> set[Prompts]:
        """The prompts that need responses in this iteration, counted from 0."""
        actor = set() if self.warms_up(iteration) else self.actor_prompts()
        return actor | (self.critic_prompts() if self.critic_learns(iteration) else set())

    def actor_prompts(self) -> set[Prompts]:
        """The prompts whose responses train the actor."""
        extra = {Prompts.labelled} if self.method_settings.actor_on_labelled else set()
        return {self.needs.actor} | extra

    @property
    def refilled(self) -> Prompts | None:
        """The prompts whose responses `refill_limit` compares: by classes, or by verdicts. None: by neither."""
        if self.needs.classes:
            return Prompts.unlabelled
        return Prompts.labelled if self.needs.actor is Prompts.labelled else None

    def critic_prompts(self) -> set[Prompts]:
        """The prompts whose responses train the critic: empty if it is frozen or absent."""
        critic = self.needs.critic
        return {critic} if critic is not None and self.trains_critic else set()

    def prompts(self) -> set[Prompts]:
        """All prompts that an iteration needs."""
        return self.actor_prompts() | self.critic_prompts()

    def count(self, prompts: set[Prompts]) -> int:
        """How many of the given prompts an iteration has."""
        of = {Prompts.labelled: self.labelled_prompts, Prompts.unlabelled: self.unlabelled_prompts}
        return sum(of[kind] for kind in prompts)


def _values(settings: Any) -> dict[str, Any]:
    return {each.name: getattr(settings, each.name) for each in fields(settings)}
