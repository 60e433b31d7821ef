"""Converts a public data set to files for a run: JSONL with `id`, `prompt` and, unless left out, `answer`.

Every dropped row is counted with its reason. A file appears complete or not at all. It replaces an existing one only
on request.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from megatron_tempo.config.benchmarks import BENCHMARKS
from megatron_tempo.config.choices import Verifier
from megatron_tempo.config.problem import show
from megatron_tempo.data.public import read_public
from megatron_tempo.data.question_keys import matching_key
from megatron_tempo.data.questions import Question, Unusable, conversion
from megatron_tempo.errors import InputError
from megatron_tempo.files import atomic_paths, why_unreadable
from megatron_tempo.rewards.code_tests import read_tests
from megatron_tempo.rewards.scorer import Item
from megatron_tempo.rewards.verifiers import Verifiers

CUSTOM = "custom"  # a set that is not one of our benchmarks
BATCH = 256  # answers that are checked together
PLACES = 3  # rows named for each reason

NO_ANSWER = "has no answer"
FAILS = "its published solution fails its tests, or they cannot be run in the sandbox"
UNREAD = "its verifier does not recognise the answer"
SPELLING = "the verifier cannot parse the answer, so that only a response with the same spelling is right"
TWICE = "the same question as an earlier row"
TYPESET = "the same question as an earlier row, in another typesetting"
SURROGATE = "has half a surrogate pair, which is no text"
CONTRADICTED = "the same question as another row, with another answer"


@dataclass(frozen=True, slots=True)
class Order:
    """What to convert, and how."""

    name: str  # of config.benchmarks, or CUSTOM
    sources: Sequence[Path]
    out: Path
    pattern: str | None = None  # glob of the folder's files; None: the benchmark's
    unlabelled: bool = False  # write questions without answers
    heldout: int = 0  # number of questions that go to a separate file
    seed: int = 0  # of the held-out questions and of shuffled options
    prompt_field: str | None = None
    answer_field: str | None = None
    id_field: str | None = None
    verifier: Verifier | None = None  # None: the benchmark's
    force: bool = False  # replace existing files


@dataclass(slots=True)
class Report:
    """The result for each row: kept, or why not."""

    rows: int = 0
    kept: int = 0
    repeated: int = 0  # of those kept: questions that an earlier row also has
    unparsed: int = 0  # of those kept: answers that their verifier cannot parse, so that only their spelling is right
    unparsed_places: list[str] = field(default_factory=list)  # of the first of these, with the answer
    dropped: Counter[str] = field(default_factory=Counter)  # rows by the reason for which they were left out
    places: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))  # of the first of these
    written: dict[Path, int] = field(default_factory=dict)  # questions by file

    def drop(self, reason: str, place: str) -> None:
        self.dropped[reason] += 1
        if self.dropped[reason] <= PLACES:
            self.places[reason].append(place)

    def reasons(self) -> list[str]:
        """One line per reason."""
        shown = {reason: ", ".join(places) for reason, places in self.places.items()}
        return [
            f"  {count} dropped: {reason} ({shown[reason]}{', ...' if count > PLACES else ''})"
            for reason, count in self.dropped.items()
        ]

    def lines(self, order: Order) -> list[str]:
        lines = [f"{self.rows} rows read, {self.kept} questions kept, {self.rows - self.kept} rows dropped"]
        lines += self.reasons()
        if self.unparsed:
            more = ", ..." if self.unparsed > len(self.unparsed_places) else ""
            lines.append(f"  {self.unparsed} kept: {SPELLING} ({', '.join(self.unparsed_places)}{more})")
        if self.repeated:
            lines.append(f"  {self.repeated} kept: {TWICE}, which the benchmark counts")
        benchmark = BENCHMARKS.get(order.name)
        if benchmark and benchmark.questions not in (None, self.kept):
            lines.append(f"  note: {order.name} has {benchmark.questions} questions as published")
        if not order.unlabelled and benchmark and benchmark.training and verifier_of(order, None) is None:
            lines.append("  note: no verifier reads these answers, which want a judge; none was checked")
        return lines + [f"{path}: {count} questions" for path, count in self.written.items()]


def prepare(order: Order, verifiers: Verifiers) -> Report:
    """Write the files of `order`. Raises InputError, before anything is written, if it cannot be done."""
    _check(order)
    report = Report()
    questions = _read(order, verifiers, report)
    if not order.unlabelled:
        questions = _verified(order, questions, verifiers, report)
    report.kept = len(questions)
    if not report.kept:
        none = f"none of the {report.rows} rows can be used" if report.rows else "there are no rows"
        sources = ", ".join(map(str, order.sources))
        raise InputError("\n".join([f"{sources}: {none}{':' if report.dropped else ''}", *report.reasons()]))
    if report.kept <= order.heldout:
        sources = ", ".join(map(str, order.sources))
        few = f"{sources}: {report.kept} questions are too few for --split-heldout={show(order.heldout)} and others"
        raise InputError("\n".join([few, *report.reasons()]))
    held = _held_out(questions, order.heldout, order.seed)
    parts = [(order.out, [q for q in questions if key_of(q) not in held])]
    if held:
        parts.append((heldout_path(order.out), [q for q in questions if key_of(q) in held]))
    _write({path: [_row(order, question) for question in part] for path, part in parts})
    report.written = {path: len(part) for path, part in parts}
    return report


def heldout_path(out: Path) -> Path:
    return out.with_name(f"{out.stem}_heldout{out.suffix}")


def verifier_of(order: Order, question: Question | None) -> Verifier | None:
    """The verifier of a question of the set."""
    own = question.verifier if question is not None else None
    benchmark = BENCHMARKS.get(order.name)
    return order.verifier or own or (benchmark.verifier if benchmark else None)


def _check(order: Order) -> None:
    if order.out.suffix != ".jsonl":
        raise InputError(f"{order.out}: the name of the output must end in .jsonl")
    if order.unlabelled and (order.answer_field or order.verifier):
        raise InputError("--unlabelled: an unlabelled set has no answers; omit --answer-field and --verifier")
    if order.name == CUSTOM and not order.unlabelled and not (order.answer_field and order.verifier):
        raise InputError("a custom set requires --answer-field and --verifier, or --unlabelled")
    benchmark = BENCHMARKS.get(order.name)
    if (
        benchmark
        and benchmark.verifier is Verifier.code
        and (order.prompt_field or order.answer_field or order.verifier)
    ):
        wrong = f"the columns of {order.name} are known, and no others replace them"
        raise InputError(f"--prompt-field, --answer-field, --verifier: {wrong}; omit them, or prepare a custom set")
    if order.name == CUSTOM and not order.prompt_field:
        raise InputError("a custom set requires --prompt-field")
    for path in [order.out, *([heldout_path(order.out)] if order.heldout else [])]:
        if not path.exists():
            continue
        if (reason := why_unreadable(path)) is not None:
            raise InputError(f"{path} {reason}; give another name")
        if not order.force:
            raise InputError(f"{path} exists already; --force replaces it")
        if not order.unlabelled and _is_unlabelled(path):
            raise InputError(f"{path} is an unlabelled set and must not contain answers; give another name")


def _is_unlabelled(path: Path) -> bool:
    try:
        with path.open(encoding="utf-8") as lines:
            row = json.loads(lines.readline())
    except ValueError:  # not a file of ours
        return False
    return isinstance(row, dict) and "answer" not in row


def _read(order: Order, verifiers: Verifiers, report: Report) -> list[Question]:
    """The questions of all rows, each with a unique id."""
    convert, names = conversion(order.name)
    given = {"prompt": order.prompt_field, "answer": order.answer_field, "id": order.id_field}
    names = replace(names, **{key: (value,) for key, value in given.items() if value is not None})
    if order.unlabelled:
        names = replace(names, answer=())  # answers, if there are any, are not read
    benchmark = BENCHMARKS.get(order.name)
    distinct = benchmark is None or benchmark.training
    questions = _Distinct(report, drop=distinct, answers=not order.unlabelled)
    for source in order.sources:
        for row in read_public(source, order.pattern or (benchmark.files if benchmark else None)):
            report.rows += 1
            try:
                question = _convert(lambda: convert(row, names, order.seed), report.rows == 1)  # noqa: B023
                if question.answer is None and not order.unlabelled:
                    raise Unusable(NO_ANSWER)
                _check_text(question)
            except Unusable as reason:
                report.drop(str(reason), row.place)
            else:
                questions.add(replace(question, id=question.id or row.place), row.place)
    return questions.questions(lambda pairs: _equal(order, verifiers, pairs))


def _check_text(question: Question) -> None:
    """Raises Unusable if a text cannot be written as UTF-8."""
    try:
        json.dumps([question.id, question.prompt, question.answer], ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        raise Unusable(SURROGATE) from None


def _convert(convert: Callable[[], Question], first: bool) -> Question:
    """If the first row lacks a column, the user must name another one. If a later row lacks it, that row is dropped."""
    try:
        return convert()
    except InputError:
        if first:
            raise
        raise Unusable("lacks a column that the first row has") from None
    except (AttributeError, KeyError, IndexError, TypeError) as error:
        raise Unusable("has columns of another form than the set's") from error


class _Distinct:
    """Questions in order, without repetitions. All rows of a question are dropped if its answers differ."""

    def __init__(self, report: Report, *, drop: bool, answers: bool) -> None:
        self._report = report
        self._drop = drop
        self._answers = answers
        self._kept: list[tuple[Question, str]] = []
        self._first: dict[str, int] = {}
        self._others: dict[int, list[tuple[Question, str]]] = defaultdict(list)  # with an answer in other words
        self._typeset: dict[str, int] = {}  # the first question of each matching key and answer
        self._ids: set[str] = set()

    def add(self, question: Question, place: str) -> None:
        first = self._first.setdefault(key_of(question), len(self._kept))
        if self._drop and first == len(self._kept) and question.answer is not None:
            # With another answer it may be another question: `x^{12}` and `x_{12}` have the same key.
            typeset = f"{matching_key(text_of(question))} {question.answer.strip()}"
            if self._typeset.setdefault(typeset, first) < first:
                del self._first[key_of(question)]
                self._report.drop(TYPESET, place)
                return
        if first < len(self._kept) and self._drop:
            if self._answers and question.answer != self._kept[first][0].answer:
                self._others[first].append((question, place))
            else:
                self._report.drop(TWICE, place)
            return
        self._report.repeated += first < len(self._kept)
        assert question.id is not None
        if question.id in self._ids:  # perhaps of another file of the set
            question = replace(question, id=f"{question.id}:{len(self._kept)}")
        self._ids.add(str(question.id))
        self._kept.append((question, place))

    def questions(self, equal: Callable[[list[tuple[Question, str]]], list[bool]]) -> list[Question]:
        """`equal`: for questions and other answers, whether these are the same answers in another spelling."""
        asked = [(i, str(other.answer)) for i, others in self._others.items() for other, _ in others]
        asked = list(dict.fromkeys(asked))
        same = dict(zip(asked, equal([(self._kept[i][0], answer) for i, answer in asked]), strict=True))
        contradicted: set[int] = set()
        for i, others in self._others.items():
            agree = all(same[i, str(other.answer)] for other, _ in others)
            if not agree:
                contradicted.add(i)
                self._report.drop(CONTRADICTED, self._kept[i][1])
            for _, place in others:
                self._report.drop(TWICE if agree else CONTRADICTED, place)
        return [question for i, (question, _) in enumerate(self._kept) if i not in contradicted]


def text_of(question: Question) -> str:
    """The question as a verifier reads it."""
    return question.prompt if isinstance(question.prompt, str) else json.dumps(question.prompt)


def key_of(question: Question) -> str:
    """The key of a question: equal for the same questions."""
    return " ".join(text_of(question).split())


def _verified(order: Order, questions: list[Question], verifiers: Verifiers, report: Report) -> list[Question]:
    """The questions whose answer their verifier accepts as a response."""
    if any(verifier_of(order, question) is Verifier.code for question in questions):
        verifiers.check_sandbox()
    right: list[Question] = []
    for start in range(0, len(questions), BATCH):
        batch = questions[start : start + BATCH]
        given = [str(question.answer if question.response is None else question.response) for question in batch]
        for question, verdict in zip(batch, _verdicts(order, verifiers, batch, given), strict=True):
            if verdict:
                right.append(question)
            else:
                report.drop(UNREAD if question.response is None else FAILS, str(question.id))
    _count_unparsed(order, right, verifiers, report)
    return right


def _count_unparsed(order: Order, questions: list[Question], verifiers: Verifiers, report: Report) -> None:
    """Count the questions whose answers no other spelling can equal, and name the first."""
    asked = [q for q in questions if verifier_of(order, q) is Verifier.math]
    for question, parsed in zip(asked, verifiers.has_value("math", [str(q.answer) for q in asked]), strict=True):
        if not parsed:
            report.unparsed += 1
            if report.unparsed <= PLACES:
                report.unparsed_places.append(f"{question.id}: {str(question.answer)[:60]!r}")


def _equal(order: Order, verifiers: Verifiers, pairs: list[tuple[Question, str]]) -> list[bool]:
    """For questions and other answers: whether the verifier accepts one answer for the other, either way."""
    equal: list[bool] = []
    for start in range(0, len(pairs), BATCH):
        batch = pairs[start : start + BATCH]
        given = _verdicts(order, verifiers, [question for question, _ in batch], [answer for _, answer in batch])
        swapped = [replace(question, answer=answer) for question, answer in batch]
        taken = _verdicts(order, verifiers, swapped, [str(question.answer) for question, _ in batch])
        compared = [_is_checked(verifier_of(order, question)) for question, _ in batch]
        equal += [known and (a > 0 or b > 0) for known, a, b in zip(compared, given, taken, strict=True)]
    return equal


def _verdicts(
    order: Order, verifiers: Verifiers, questions: list[Question], given: list[str] | None = None
) -> list[float]:
    """The verdicts on `given` as responses, or on the questions' own answers. 1.0 if there is no verdict."""
    given = [str(question.answer) for question in questions] if given is None else given
    asked = list(zip(questions, given, strict=True))
    try:
        items = [_item(question, verifier_of(order, question), one) for question, one in asked]
        scores = iter(verifiers.score([item for item in items if item is not None]))
        return [1.0 if item is None else next(scores) for item in items]
    except ValueError:  # the first answer that its verifier rejects as unusable
        if len(questions) == 1:
            return [0.0]
        return [verdict for question, one in asked for verdict in _verdicts(order, verifiers, [question], [one])]


def _is_checked(verifier: Verifier | None) -> bool:
    return verifier not in (None, Verifier.judge)


def _item(question: Question, verifier: Verifier | None, given: str) -> Item | None:
    if verifier is None or not _is_checked(verifier):
        return None
    if verifier is Verifier.code:
        if given == question.answer:  # there is no program: the tests can only be read
            read_tests(given)
            return None
        return Item(verifier.name, text_of(question), given, str(question.answer))
    return Item(verifier.name, text_of(question), stated(verifier, given), str(question.answer))


def stated(verifier: Verifier, answer: str) -> str:
    r"""A response that states the answer. In mathematics its text differs from the answer's, so the verifier compares
    values: it accepts equal texts without reading them.
    """
    if verifier is Verifier.math:
        return f"\\boxed{{\\displaystyle {answer.strip().strip('$')}}}"
    return answer if verifier in (Verifier.grid, Verifier.countdown) else f"Answer: {answer}"


def _held_out(questions: list[Question], count: int, seed: int) -> set[str]:
    """The keys of `count` questions, drawn by the seed and each question's text only."""

    def draw(key: str) -> bytes:
        return hashlib.sha256(json.dumps([seed, key]).encode()).digest()

    return set(sorted({key_of(question) for question in questions}, key=draw)[:count])


def _row(order: Order, question: Question) -> dict[str, Any]:
    row: dict[str, Any] = {"id": question.id, "prompt": question.prompt}
    if order.unlabelled:
        return row
    row["answer"] = question.answer
    if question.verifier is not None and order.verifier is None:
        benchmark = BENCHMARKS[order.name]
        assert benchmark.verifier is None
        row["verifier"] = question.verifier.name
    return row


def _write(parts: dict[Path, list[dict[str, Any]]]) -> None:
    """Write all files under temporary names first, so that they appear together."""
    for path in parts:
        path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_paths(list(parts), fsync=True) as temporaries:
        for temporary, rows in zip(temporaries, parts.values(), strict=True):
            with temporary.open("w", encoding="utf-8") as file:
                file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
