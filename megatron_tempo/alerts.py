"""What is worth waking up for: the rules, each a pure function of a run's records.

The console tells of an alert once, when it first fires; `megatron-tempo status` and the report tell of all. The
thresholds are choices of ours: on ten runs of the quickstart's size they tell of truncated responses, which do rise
there, of a few spikes of the gradient's norm, and of iterations that slow down where the machine is shared.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean, median

from megatron_tempo.records import Record

RECENT = 5  # records whose mean or median stands for now; as many at a stage's start stand for what was
AUROC_FALL = 0.05  # below the best so far
GAP_GROWTH, GAP_FLOOR = 2.0, 0.02  # times the stage's start; nats below which no gap matters
ENTROPY_LEFT = 0.2  # of that at the stage's start
CLIP_HIGH = 0.5  # of the tokens: the larger part of a batch teaches nothing
CLIP_NEVER, CLIP_ONCE = 20, 1e-3  # so many iterations without any clipping, in a stage that once clipped so much
TRUNCATED_RISE = 0.15  # above the share at the run's start
SLOWER = 2.0  # times the stage's start
SPIKE, SPIKE_WINDOW, SPIKE_KNOWN = 10.0, 20, 5  # times the median of so many records before, if so many are known

# The step of each record at which a rule holds, and what is seen there.
Firing = tuple[int, str]


@dataclass(frozen=True, slots=True)
class Rule:
    """`fires` reads the records of one file, in their order; what it says of a record, it says from those up to it."""

    name: str
    reads: str  # the numbers of records that it looks at, by name
    of_evaluations: bool
    advice: str
    fires: Callable[[Sequence[Record]], Iterator[Firing]]


@dataclass(frozen=True, slots=True)
class Alert:
    """A rule that has fired."""

    name: str
    advice: str
    first: int  # the step at which it fired first
    last: int
    count: int  # records at which it fired
    seen: str  # at `last`
    active: bool  # it fires at the newest record that it could fire at

    def told(self) -> str:
        since = f"step {self.first}" if self.first == self.last else f"steps {self.first} to {self.last}"
        return f"{self.name}, {since}{'' if self.active else ' (over)'}: {self.seen}"

    def line(self) -> str:
        """With what to do about it."""
        return f"{self.told()}; {self.advice}"


def alerts(metrics: Sequence[Record], evaluations: Sequence[Record]) -> list[Alert]:
    """All rules that have fired, in the order of their first firing."""
    found = []
    for rule in RULES:
        records = evaluations if rule.of_evaluations else metrics
        firings = list(rule.fires(records))
        if firings:
            newest = max(record["step"] for record in records if not rule.of_evaluations or _auroc(record) is not None)
            last, seen = firings[-1]
            alert = Alert(rule.name, rule.advice, firings[0][0], last, len(firings), seen, active=last == newest)
            found.append(alert)
    return sorted(found, key=lambda alert: alert.first)


def _auroc(record: Record) -> float | None:
    calibration = record.get("calibration")
    found: float | None = calibration["last"]["auroc"] if calibration else None
    return found


def _auroc_falls(evaluations: Sequence[Record]) -> Iterator[Firing]:
    best: dict[str, tuple[float, int]] = {}  # by set
    for record in evaluations:
        auroc = _auroc(record)
        if auroc is None:
            continue
        high, at = best.get(record["set"], (auroc, record["step"]))
        if auroc < high - AUROC_FALL:
            yield record["step"], f"AUROC on {record['set']} {auroc:.3f}, was {high:.3f} at step {at}"
        elif auroc >= high:
            best[record["set"]] = (auroc, record["step"])


def _by_stage(metrics: Sequence[Record], name: str) -> Iterator[tuple[Record, list[float]]]:
    """Each record that has the number, with the stage's numbers up to it."""
    known: dict[str, list[float]] = {}
    for record in metrics:
        if record.get(name) is not None:
            numbers = known.setdefault(record["stage"], [])
            numbers.append(record[name])
            yield record, numbers


def _gap_grows(metrics: Sequence[Record]) -> Iterator[Firing]:
    for record, gaps in _by_stage(metrics, "engine/logprob_gap_mean"):
        if len(gaps) >= 2 * RECENT:
            early, now = median(gaps[:RECENT]), fmean(gaps[-RECENT:])
            if now > max(GAP_FLOOR, GAP_GROWTH * early):
                yield record["step"], f"{now:.3g} nats a token, was {early:.3g}"


def _entropy_collapses(metrics: Sequence[Record]) -> Iterator[Firing]:
    for record, entropies in _by_stage(metrics, "actor/entropy"):
        if len(entropies) >= 2 * RECENT:
            early, now = fmean(entropies[:RECENT]), fmean(entropies[-RECENT:])
            if now < ENTROPY_LEFT * early:
                yield record["step"], f"{now:.3g} nats a token, was {early:.3g}"


def _clips_much(metrics: Sequence[Record]) -> Iterator[Firing]:
    for record, fractions in _by_stage(metrics, "actor/clip_fraction"):
        if len(fractions) >= RECENT and (now := fmean(fractions[-RECENT:])) > CLIP_HIGH:
            yield record["step"], f"{now:.0%} of the tokens are clipped"


def _clips_no_more(metrics: Sequence[Record]) -> Iterator[Firing]:
    highest: dict[str, float] = {}
    for record, fractions in _by_stage(metrics, "actor/clip_fraction"):
        once = highest[record["stage"]] = max(highest.get(record["stage"], 0.0), fractions[-1])
        if once >= CLIP_ONCE and len(fractions) > CLIP_NEVER and max(fractions[-CLIP_NEVER:]) == 0:
            yield record["step"], f"no token was clipped in {CLIP_NEVER} iterations, up to {once:.2%} were before"


def _truncated_rises(metrics: Sequence[Record]) -> Iterator[Firing]:
    shares: list[float] = []
    for record in metrics:
        if record.get("truncated") is None:
            continue
        shares.append(record["truncated"])
        if len(shares) >= 2 * RECENT:
            early, now = fmean(shares[:RECENT]), fmean(shares[-RECENT:])
            if now > early + TRUNCATED_RISE:
                yield record["step"], f"{now:.0%} of the responses do not end, were {early:.0%}"


def _skips(metrics: Sequence[Record]) -> Iterator[Firing]:
    for record in metrics:
        skipped = {model: record.get(f"{model}/skipped") or 0 for model in ("actor", "critic")}
        if any(skipped.values()):
            words = [f"{count:.0f} of the {model}'s" for model, count in skipped.items() if count]
            yield record["step"], f"{' and '.join(words)} were not finite"


def _slows_down(metrics: Sequence[Record]) -> Iterator[Firing]:
    for record, seconds in _by_stage(metrics, "seconds"):
        if len(seconds) > 2 * RECENT:
            early, now = median(seconds[1 : 1 + RECENT]), median(seconds[-RECENT:])  # the first compiles and warms up
            if now > SLOWER * early:
                yield record["step"], f"{now:.3g} s an iteration, was {early:.3g} s"


def _gradient_spikes(metrics: Sequence[Record]) -> Iterator[Firing]:
    found: dict[int, list[str]] = {}
    for model in ("actor", "critic"):
        for record, norms in _by_stage(metrics, f"{model}/grad_norm"):
            before = norms[-1 - SPIKE_WINDOW : -1]
            if len(before) >= SPIKE_KNOWN and norms[-1] > SPIKE * median(before):
                words = f"the {model}'s {norms[-1]:.3g}, {norms[-1] / median(before):.0f} times the usual"
                found.setdefault(record["step"], []).append(words)
    yield from ((step, " and ".join(words)) for step, words in sorted(found.items()))


RULES = (
    Rule(
        "critic's AUROC falls",
        "calibration.last.auroc",
        True,
        "the actor's rewards are worth less: more labelled prompts or a higher critic rate, stage2.estep_every=1",
        _auroc_falls,
    ),
    Rule(
        "engine and trainer drift apart",
        "engine/logprob_gap_mean",
        False,
        "compare the weights (rollout.servers.checksums_every=1); weigh tokens by stage2.actor.importance_cap",
        _gap_grows,
    ),
    Rule(
        "entropy collapses",
        "actor/entropy",
        False,
        "a smaller actor rate, or stage2.actor.entropy_coef",
        _entropy_collapses,
    ),
    Rule(
        "clipping takes over",
        "actor/clip_fraction",
        False,
        "a smaller actor rate, fewer epochs or larger mini-batches",
        _clips_much,
    ),
    Rule(
        "clipping has ceased",
        "actor/clip_fraction",
        False,
        "the actor hardly moves: look at its rate and at advantage/std",
        _clips_no_more,
    ),
    Rule(
        "truncated responses rise",
        "truncated",
        False,
        "they count as wrong: read samples.jsonl, raise rollout.max_response_tokens",
        _truncated_rises,
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
        "time/PHASE in metrics.jsonl says where; longer responses are one reason",
        _slows_down,
    ),
    Rule(
        "gradient norm spikes",
        "actor/grad_norm, critic/grad_norm",
        False,
        "one is clipped and harmless; many ask for a smaller rate",
        _gradient_spikes,
    ),
)
