"""Alerts: rules that read a run's records one after another and fire when training looks wrong.

The console prints an alert once, when it first fires. `megatron-tempo status` and the report show all alerts. We chose
the thresholds. On ten runs of the quickstart's size they fire for truncated responses, which do rise there, for a few
spikes of the gradient norm, and for iterations that slow down on a shared machine.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean, median

from megatron_tempo.observability.console import readable
from megatron_tempo.observability.evaluation_alerts import (
    Look,
    accuracy_falls,
    auroc,
    auroc_falls,
    auroc_within_questions,
    overestimate,
    overestimates,
    tells_no_response_apart,
)
from megatron_tempo.observability.records import Record

RECENT = 5  # records that are averaged for the current value, and for the value at the stage's start
GAP_GROWTH, GAP_FLOOR = 2.0, 0.02  # times the stage's start; nats below which no gap matters
ENTROPY_LEFT = 0.2  # fraction of the entropy at the stage's start
CLIP_HIGH = 0.5  # fraction of the tokens: most of a batch contributes no gradient
CLIP_NEVER, CLIP_ONCE = 20, 1e-3  # iterations without any clipping, in a stage that once clipped this fraction
MASKED = 0.5  # fraction of the tokens: most of a batch is thrown away
ESS_LEFT = 0.1  # effective sample size, as a share of the samples
TRUNCATED_RISE = 0.15  # above the share at the run's start
SLOWER = 2.0  # times the stage's start
SPIKE, SPIKE_WINDOW, SPIKE_KNOWN = 10.0, 20, 5  # times the median of the last 20 records, if at least 5 are known


@dataclass(frozen=True, slots=True)
class Rule:
    """`begin` returns a `Look` for the records of one file, in their order."""

    name: str
    reads: str  # names of the numbers in a record that it reads
    of_evaluations: bool
    advice: str
    begin: Callable[[], Look]
    applies: Callable[[Record], bool] = lambda record: True  # whether a record has what the rule looks at


@dataclass(frozen=True, slots=True)
class Alert:
    """A rule that has fired."""

    name: str
    advice: str
    first: int  # the step at which it first fired
    last: int
    count: int  # number of records at which it fired
    seen: str  # what was wrong at `last`
    active: bool  # it fires at the newest record that it reads

    def message(self) -> str:
        since = f"step {self.first}" if self.first == self.last else f"steps {self.first} to {self.last}"
        return f"{self.name}, {since}{'' if self.active else ' (over)'}: {self.seen}"

    def line(self) -> str:
        """The message and what to do about it."""
        return f"{self.message()}; {self.advice}"


class Watch:
    """Applies all rules to a run's records as they arrive. Its memory does not grow with their number."""

    def __init__(self) -> None:
        self._looks = [(rule, rule.begin()) for rule in RULES]
        self._fired: dict[str, Alert] = {}
        self._newest: dict[str, int] = {}  # step of the newest record that a rule looked at, by its name

    def metrics(self, record: Record) -> None:
        """The next record of metrics.jsonl."""
        self._look(record, of_evaluations=False)

    def evaluation(self, record: Record) -> None:
        """The next record of evaluations.jsonl."""
        self._look(record, of_evaluations=True)

    def alerts(self) -> list[Alert]:
        """All alerts so far, by the step at which they first fired."""
        known = [
            replace(self._fired[rule.name], active=self._fired[rule.name].last == self._newest[rule.name])
            for rule in RULES
            if rule.name in self._fired
        ]
        return sorted(known, key=lambda alert: alert.first)

    def _look(self, record: Record, *, of_evaluations: bool) -> None:
        step = record["step"]
        for rule, look in self._looks:
            if rule.of_evaluations is not of_evaluations or not rule.applies(record):
                continue
            self._newest[rule.name] = max(self._newest.get(rule.name, 0), step)
            if (seen := look(record)) is not None:
                before = self._fired.get(rule.name)
                first, count = (step, 1) if before is None else (before.first, before.count + 1)
                self._fired[rule.name] = Alert(rule.name, rule.advice, first, step, count, seen, active=True)


def alerts(metrics: Sequence[Record], evaluations: Sequence[Record]) -> list[Alert]:
    """All alerts of these records, by the step at which they first fired."""
    watch = Watch()
    for record in metrics:
        watch.metrics(record)
    for record in evaluations:
        watch.evaluation(record)
    return watch.alerts()


@dataclass(slots=True)
class _Numbers:
    """Values of one number, in the records of a stage or of all stages: how many, the first and the last ones."""

    count: int = 0
    first: list[float] = field(default_factory=list)  # RECENT + 1
    last: deque[float] = field(default_factory=lambda: deque(maxlen=SPIKE_WINDOW + 1))
    highest: float = 0.0

    def add(self, number: float) -> None:
        self.count += 1
        self.highest = max(self.highest, number)
        self.last.append(number)
        if len(self.first) <= RECENT:
            self.first.append(number)

    def recent(self, count: int = RECENT) -> list[float]:
        return list(self.last)[-count:]


def _each(name: str, judge: Callable[[_Numbers], str | None], *, by_stage: bool = True) -> Callable[[], Look]:
    """A rule on one number: `judge` returns what is wrong with it. Records without the number are skipped."""

    def begin() -> Look:
        known: dict[str, _Numbers] = {}

        def look(record: Record) -> str | None:
            if record.get(name) is None:
                return None
            numbers = known.setdefault(record["stage"] if by_stage else "", _Numbers())
            numbers.add(record[name])
            return judge(numbers)

        return look

    return begin


def _gap_grows(gaps: _Numbers) -> str | None:
    early, now = median(gaps.first[:RECENT]), fmean(gaps.recent())
    grown = gaps.count >= 2 * RECENT and now > max(GAP_FLOOR, GAP_GROWTH * early)
    return f"{readable(now)} nats a token, was {readable(early)}" if grown else None


def _entropy_collapses(entropies: _Numbers) -> str | None:
    early, now = fmean(entropies.first[:RECENT]), fmean(entropies.recent())
    fallen = entropies.count >= 2 * RECENT and now < ENTROPY_LEFT * early
    return f"{readable(now)} nats a token, was {readable(early)}" if fallen else None


def _clips_much(fractions: _Numbers) -> str | None:
    now = fmean(fractions.recent())
    return f"{now:.0%} of the tokens are clipped" if fractions.count >= RECENT and now > CLIP_HIGH else None


def _clips_no_more(fractions: _Numbers) -> str | None:
    once = fractions.highest
    if once >= CLIP_ONCE and fractions.count > CLIP_NEVER and max(fractions.recent(CLIP_NEVER)) == 0:
        return f"no token was clipped in the last {CLIP_NEVER} iterations, up to {once:.2%} before"
    return None


def _masks_most(fractions: _Numbers) -> str | None:
    now = fmean(fractions.recent())
    return f"{now:.0%} of the tokens are masked" if fractions.count >= RECENT and now > MASKED else None


def _few_are_effective(shares: _Numbers) -> str | None:
    now = fmean(shares.recent())
    few = shares.count >= RECENT and now < ESS_LEFT
    return f"the effective sample size is {now:.1%} of the samples" if few else None


def _is_not_trained(rows: _Numbers) -> str | None:
    idle = rows.count >= RECENT and max(rows.recent()) == 0
    return f"no response was left to train it on in the last {RECENT} iterations" if idle else None


def _truncated_rises(shares: _Numbers) -> str | None:
    early, now = fmean(shares.first[:RECENT]), fmean(shares.recent())
    risen = shares.count >= 2 * RECENT and now > early + TRUNCATED_RISE
    return f"{now:.0%} of the responses are truncated, was {early:.0%}" if risen else None


def _slows_down(seconds: _Numbers) -> str | None:
    if seconds.count <= 2 * RECENT:
        return None
    early, now = median(seconds.first[1:]), median(seconds.recent())  # the first compiles and warms up
    return f"{readable(now)} s per iteration, was {readable(early)} s" if now > SLOWER * early else None


def _spikes(norms: _Numbers) -> str | None:
    *before, now = norms.last
    if len(before) < SPIKE_KNOWN:
        return None
    usual = median(before)  # 0 if all advantages were 0
    return f"{readable(now)}, {now / usual:.0f} times the median" if usual and now > SPIKE * usual else None


def _gradient_spikes() -> Look:
    looks = {model: _each(f"{model}/grad_norm", _spikes)() for model in ("actor", "critic")}

    def look(record: Record) -> str | None:
        seen = {model: one(record) for model, one in looks.items()}
        return " and ".join(f"the {model}'s {words}" for model, words in seen.items() if words) or None

    return look


def _skips() -> Look:
    return _skipped


def _skipped(record: Record) -> str | None:
    skipped = {model: record.get(f"{model}/skipped") or 0 for model in ("actor", "critic")}
    words = [f"{count:.0f} of the {model}'s steps" for model, count in skipped.items() if count]
    return f"{' and '.join(words)} were not finite" if words else None


def _is_resynced() -> Look:
    def look(record: Record) -> str | None:
        count, dropped = record.get("engine/resyncs") or 0, record.get("actor/rows_dropped") or 0
        words = [f"weights were sent again {count:.0f} times"] if count else []
        words += [f"the actor was not trained on {dropped:.0f} responses"] if dropped else []
        return ", ".join(words) or None

    return look


RULES = (
    Rule(
        "critic's AUROC falls",
        "calibration.last.auroc",
        True,
        "the actor's rewards become less reliable: use more labelled prompts, a higher critic learning rate or "
        "stage2.estep_every=1",
        auroc_falls,
        applies=lambda record: auroc(record) is not None,
    ),
    Rule(
        "critic does not tell a question's responses apart",
        "calibration.last.auroc_within_questions",
        True,
        "its values, which are TEMPO's rewards, do not say which response to a question is right: train the critic "
        "longer in stage 1, or on more labelled questions, or choose a larger model",
        tells_no_response_apart,
        applies=lambda record: record.get("stage") == "stage2" and auroc_within_questions(record) is not None,
    ),
    Rule(
        "critic is too optimistic",
        "calibration.last.bins",
        True,
        "the actor writes what the critic overrates: train the critic again (stage2.estep_every=1, more labelled "
        "prompts), and resume from a checkpoint before it began",
        overestimates,
        applies=lambda record: overestimate(record) is not None,
    ),
    Rule(
        "accuracy falls",
        "avg",
        True,
        "the actor gets worse, whatever its rewards say: resume from a checkpoint before the fall, with a lower "
        "learning rate, a KL term (stage2.actor.kl_coef) or stage2.baseline=before_token",
        accuracy_falls,
        applies=lambda record: record.get("avg") is not None,
    ),
    Rule(
        "engine and trainer drift apart",
        "engine/logprob_gap_mean",
        False,
        "compare the weights (rollout.servers.checksums_every=1), or set stage2.actor.correction.level",
        _each("engine/logprob_gap_mean", _gap_grows),
    ),
    Rule(
        "the correction masks most tokens",
        "correction/tokens_masked",
        False,
        "lower rollout.max_staleness, widen the bounds of stage2.actor.correction, or use out_of_bounds=truncate",
        _each("correction/tokens_masked", _masks_most),
    ),
    Rule(
        "few samples are effective",
        "engine/ess",
        False,
        "a few tokens outweigh all others: lower rollout.max_staleness, and compare the engine's weights",
        _each("engine/ess", _few_are_effective),
    ),
    Rule(
        "the correction leaves few samples",
        "correction/ess",
        False,
        "lower stage2.actor.correction.high, or use level=geometric or token, whose ratios do not grow with the length",
        _each("correction/ess", _few_are_effective),
    ),
    Rule(
        "engine has drifted",
        "engine/resyncs, actor/rows_dropped",
        False,
        "warnings.jsonl names the server and the tensors; if it happens again, update or replace the engine",
        _is_resynced,
    ),
    Rule(
        "the actor is not trained",
        "actor/rows",
        False,
        "all responses are truncated and masked, or out of EMPO's bounds: raise rollout.max_response_tokens, or change "
        "the stage's truncated_responses or entropy_low and entropy_high",
        _each("actor/rows", _is_not_trained),
    ),
    Rule(
        "entropy collapses",
        "actor/entropy",
        False,
        "lower the actor's learning rate, or set stage2.actor.entropy_coef",
        _each("actor/entropy", _entropy_collapses),
    ),
    Rule(
        "clipping takes over",
        "actor/clip_fraction",
        False,
        "use a lower actor learning rate, fewer epochs or larger mini-batches",
        _each("actor/clip_fraction", _clips_much),
    ),
    Rule(
        "clipping has ceased",
        "actor/clip_fraction",
        False,
        "the actor hardly changes: check its learning rate and advantage/std",
        _each("actor/clip_fraction", _clips_no_more),
    ),
    Rule(
        "truncated responses rise",
        "truncated",
        False,
        "read samples.jsonl; raise rollout.max_response_tokens, or set stage2.truncated_responses",
        _each("truncated", _truncated_rises, by_stage=False),
    ),
    Rule(
        "steps are skipped",
        "actor/skipped, critic/skipped",
        False,
        "their mini-batches are in skipped/ of the run's folder",
        _skips,
    ),
    Rule(
        "iterations slow down",
        "seconds",
        False,
        "see time/PHASE in metrics.jsonl; longer responses are one possible reason",
        _each("seconds", _slows_down),
    ),
    Rule(
        "gradient norm spikes",
        "actor/grad_norm, critic/grad_norm",
        False,
        "a single spike is clipped and harmless; if there are many, lower the learning rate",
        _gradient_spikes,
    ),
)
