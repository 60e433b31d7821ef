"""Questions about dates as in BIG-Bench Hard's `date_understanding`, but without options: the answer is the date.

None is a question of BIG-Bench Hard, whose years end with 2021.
"""

from __future__ import annotations

import calendar
import datetime
import random
from dataclasses import dataclass

from logic_parts.habits import Steps

YEARS = range(2022, 2100)
NAMES = ("Jane", "John", "Mary", "Tom", "Ann", "Paul")
MOST_DAYS = 25  # of a step, so that it passes at most one end of a month
MISLED_LENGTH = 30  # the misconception: every month has 30 days
FORMS = ("{month} {day}, {year}", "{day} {month} {year}", "{number}/{day}/{year}")

# What is said of a date, by the step from it to today.
PREMISES = {
    "none": ("Today is {date}.", "It is {date} today."),
    "next": ("Yesterday was {date}.", "{name} saw the dentist yesterday, {date}."),
    "previous": ("Tomorrow is {date}.", "{name} has an exam tomorrow, {date}."),
    "days": ("{name} left on {date}, {n} days ago.", "{name} bought {n} eggs on {date} and ate one a day until today."),
    "days_back": ("{name} comes back on {date}, in {n} days.", "The deadline is {date}, {n} days from today."),
    "years": ("{name} married on {date}. It is the {n}-year anniversary today.",),
}
# What is asked, by name.
ASKED = {
    "today": "today",
    "tomorrow": "tomorrow",
    "yesterday": "yesterday",
    "week": "one week from today",
    "week_back": "one week ago from today",
    "days": "{n} days from today",
    "days_back": "{n} days ago",
    "month_back": "a month ago",
    "year_back": "one year ago from today",
}
NEAR, FAR = ("today", "tomorrow", "yesterday"), ("week", "week_back", "days", "days_back", "month_back", "year_back")
# Premises and what is asked, by level.
LEVELS = {
    1: ((("none",), ("tomorrow", "yesterday")), (("next", "previous"), ("today",))),
    2: ((("none",), FAR), (("next", "previous"), ("tomorrow", "yesterday"))),
    3: ((("next", "previous"), FAR), (("days", "days_back", "years"), (*NEAR, *FAR))),
}


@dataclass(frozen=True, slots=True)
class Step:
    """A number of days, months or years, forward or back."""

    unit: str
    count: int

    def of(self, date: datetime.date) -> datetime.date:
        """The date after this step. Raises ValueError if the month has no such day."""
        if self.unit == "days":
            return date + datetime.timedelta(days=self.count)
        months = date.month - 1 + self.count * (12 if self.unit == "years" else 1)
        return date.replace(year=date.year + months // 12, month=months % 12 + 1)


@dataclass(frozen=True, slots=True)
class DateQuestion:
    """A date, the steps from it to today and from today to what is asked, and the words."""

    stated: datetime.date
    steps: tuple[Step, ...]
    prompt: str

    @property
    def answer(self) -> str:
        date = self.stated
        for step in self.steps:
            date = step.of(date)
        return written(date)

    @property
    def is_misleading(self) -> bool:
        right = (self.stated.year, self.stated.month, self.stated.day)
        for step in self.steps:
            right, _ = reckoned(right, step, None, misled=True)
        return form(right) != self.answer

    def trace(self, steps: Steps) -> str:
        """The stated date, the arithmetic of each step, and the date after it."""
        date = (self.stated.year, self.stated.month, self.stated.day)
        if not self.steps:
            return f"So the answer is {form(date)}."
        sentences = [f"{form(date)}."]
        for number, step in enumerate(self.steps, 1):
            date, arithmetic = reckoned(date, step, steps, misled=steps.misled)
            is_last = number == len(self.steps)
            sentences.append(f"{arithmetic}, so {'the answer is' if is_last else 'today is'} {form(date)}.")
        return " ".join(sentences)


# A date as a trace has it, which need not exist: year, month, day.
Reckoned = tuple[int, int, int]


def reckoned(date: Reckoned, step: Step, slips: Steps | None, *, misled: bool) -> tuple[Reckoned, str]:
    """The date after a step, and the words of its arithmetic. `slips` None: no random errors."""
    year, month, day = date
    if step.unit == "years":
        result = year + step.count
        result = slips.number(result, YEARS[0] - 30, YEARS[-1] + 30) if slips else result
        return (result, month, day), f"{year}{step.count:+d}={result}"
    if step.unit == "months":
        total = month + step.count  # one month back
        words = f"{month}{step.count:+d}={total}"
        return ((year, total, day), words) if total else ((year - 1, 12, day), f"{words}, which is December")
    total = day + step.count
    total = slips.number(total, -60, 99) if slips else total
    words = f"{day}{step.count:+d}={total}"
    if step.count > 0:
        length = month_length(year, month, slips, misled=misled)
        words += f". {calendar.month_name[month]} has {length} days"
        if total > length:
            year, month, total = (year, month + 1, total - length) if month < 12 else (year + 1, 1, total - length)
    elif total <= 0:
        year, month = (year, month - 1) if month > 1 else (year - 1, 12)
        length = month_length(year, month, slips, misled=misled)
        words += f". {calendar.month_name[month]} has {length} days"
        total += length
    day = max(1, min(31, total))
    return (year, month, slips.number(day, 1, 31) if slips else day), words


def month_length(year: int, month: int, slips: Steps | None, *, misled: bool) -> int:
    length = MISLED_LENGTH if misled else calendar.monthrange(year, month)[1]
    return slips.number(length, 28, 31) if slips else length


def form(date: Reckoned) -> str:
    return f"{date[1]:02d}/{date[2]:02d}/{date[0]:04d}"


def written(date: datetime.date) -> str:
    return form((date.year, date.month, date.day))


def draw(level: int, rng: random.Random) -> DateQuestion:
    premises, asked = rng.choice(LEVELS[level])
    while True:
        premise, target = rng.choice(premises), rng.choice(asked)
        stated = datetime.date(rng.choice(YEARS), rng.randint(1, 12), 1)
        stated = stated.replace(day=rng.randint(1, calendar.monthrange(stated.year, stated.month)[1]))
        n, m = (rng.randint(2, MOST_DAYS) for _ in range(2))
        steps = tuple(step for step in (_to_today(premise, n), _from_today(target, m)) if step.count)
        words = f"{_words(premise, stated, n, rng)} What is the date {ASKED[target].format(n=m)} in MM/DD/YYYY?"
        question = DateQuestion(stated, steps, words)
        if _exists(question):
            return question


def _to_today(premise: str, n: int) -> Step:
    """The step from the stated date to today."""
    counts = {"none": 0, "next": 1, "previous": -1, "days": n, "days_back": -n, "years": n}
    return Step("years" if premise == "years" else "days", counts[premise])


def _from_today(target: str, m: int) -> Step:
    """The step from today to the date that is asked for."""
    if target == "month_back":
        return Step("months", -1)
    if target == "year_back":
        return Step("years", -1)
    counts = {"today": 0, "tomorrow": 1, "yesterday": -1, "week": 7, "week_back": -7, "days": m, "days_back": -m}
    return Step("days", counts[target])


def _exists(question: DateQuestion) -> bool:
    try:
        date = question.stated
        for step in question.steps:
            date = step.of(date)
            if date.year not in YEARS:
                return False
    except ValueError:  # as February 30
        return False
    return True


def _words(premise: str, stated: datetime.date, n: int, rng: random.Random) -> str:
    month, number = calendar.month_name[stated.month], stated.month
    date = rng.choice(FORMS).format(month=month, number=number, day=stated.day, year=stated.year)
    return rng.choice(PREMISES[premise]).format(date=date, name=rng.choice(NAMES), n=n)
