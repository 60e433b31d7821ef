"""A stage of training: its method, whose responses train actor and critic, and how they are updated."""

from __future__ import annotations

from dataclasses import MISSING, dataclass, field, fields
from functools import cache
from typing import Any, NamedTuple, TypeVar

from megatron_tempo.config import extensions
from megatron_tempo.config.extensions import Extension, ExtensionError
from megatron_tempo.config.method_settings import (
    NEEDS,
    SETTINGS,
    Method,
    MethodSettings,
    Needs,
    Prompts,
    TempoSettings,
)
from megatron_tempo.config.truncation import TruncatedResponses
from megatron_tempo.config.updates import ActorUpdateConfig, CriticUpdateConfig

_Settings = TypeVar("_Settings", bound="MethodSettings")


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
            wrong, "needs = Needs(actor=Prompts.labelled, critic=None), from megatron_tempo.config.method_settings"
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
        fix = "a dataclass that derives from MethodSettings, of megatron_tempo.config.method_settings"
        raise ExtensionError(wrong, fix)
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
