"""The console's lines on an iteration and on an evaluation, each at most as wide as the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_tempo.config.extensions import short_name
from megatron_tempo.observability.progress import clock
from megatron_tempo.observability.records import Record

# Columns of an iteration in their order: rank, format, name of the number. A column is left out if the record lacks its
# number. If the terminal is too narrow for all, the columns of the highest ranks are left out; metrics.jsonl has them.
COLUMNS = (
    (1, "reward {:6.3f}", "reward/labelled"),
    (2, "value {:5.3f}", "reward/unlabelled_value"),
    (6, "agreement {:5.3f}", "reward/unlabelled"),
    (7, "certainty {:5.2f}", "reward/self_certainty"),
    (3, "entropy {:5.3f}", "actor/entropy"),
    (8, "clip {:5.3f}", "actor/clip_fraction"),
    (10, "actor grad {:>6}", "actor/grad_norm"),
    (9, "critic loss {:5.3f}", "critic/loss"),
    (11, "critic grad {:>6}", "critic/grad_norm"),
    (12, "{:6,.0f} tok/s", "tokens_per_second"),
    (13, "ess {:4.0%}", "correction/ess"),
    (4, "idle {:3.0%}", "idle_share"),
    (5, "{:5.1f} s", "seconds"),
)


def step_line(line: Record, iterations: int | None, left: float | None, width: int) -> str:
    """A line on an iteration. `iterations`: of its stage, if known. `left`: seconds to the end of the run, if known."""
    total = "" if iterations is None else str(iterations)
    count = f"{line['iteration']:>{len(total)}}{total and '/'}{total}"
    cells = [(0, f"{line['stage']} {short_name(line['method']):<5} {count}")]
    for rank, form, name in COLUMNS:
        if is_number(line.get(name)):
            cells.append((rank, form.format(readable(line[name], 2) if ">" in form else line[name])))
    if iterations is not None:
        cells.append((0, f"{clock(left)} left"))
    return fitted(cells, width)


def evaluation_line(line: Record, width: int) -> str:
    """A line on the scores of one evaluation set."""
    cells = [
        (0, f"evaluation  {line['point']:<7} {line['set']:<10}"),
        (0, _score(f"avg@{line['avg_k']}", line["avg"], line["avg_se"])),
    ]
    cells += [(1, _score(f"pass@{k}", value, line["pass_se"].get(k))) for k, value in line["pass"].items()]
    cells.append((3, f"{line['questions']} questions"))
    if line.get("calibration"):
        last = line["calibration"]["last"]
        within = last.get("auroc_within_questions")  # earlier records do not have it
        cells += [(2, _score("AUROC", last["auroc"], None)), (4, _score("ECE", last["ece"], None))]
        cells += [] if within is None else [(4, _score("AUROC within questions", within, None))]
    return fitted(cells, width)


def fitted(cells: Sequence[tuple[int, str]], width: int) -> str:
    """The cells, in their order, that fit in `width` columns. Those of low rank come first; rank 0 always stays."""
    kept: set[int] = set()
    room = width + 2
    for i in sorted(range(len(cells)), key=lambda i: cells[i][0]):
        room -= len(cells[i][1]) + 2
        if room < 0 and cells[i][0] > 0:
            break  # and none of a higher rank, so that the columns do not change from line to line
        kept.add(i)
    return "  ".join(cell for i, (_, cell) in enumerate(cells) if i in kept)


def readable(number: float, digits: int = 3) -> str:
    """The number with this many digits, and all its digits before the point: 0.0123, 1,752 and not 1.75e+03."""
    if 10 ** (digits - 1) <= abs(number) < 1e15:
        return f"{number:,.0f}"
    return f"{number:.{digits}g}"


def is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _score(name: str, value: float | None, se: float | None) -> str:
    return f"{name} {'-' if value is None else f'{value:.3f}'}{'' if se is None else f' ± {se:.3f}'}"
