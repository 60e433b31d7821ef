"""Boolean expressions as in BIG-Bench Hard's `boolean_expressions`: `not ( True or False ) and True is`.

None is a question of BIG-Bench Hard, where each expression with brackets has at most three operands, and each without
has four, or an odd number of `not` of at least three.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from logic_parts.habits import Steps

# Operands, and whether a group of them is in brackets, by level.
SIZES = {1: ((2, 3), False), 2: ((4,), True), 3: ((5, 6), True)}
MOST_NOTS = 2  # before all operands of an expression without brackets; one before each operand of others
NEGATED = 0.3


@dataclass(frozen=True, slots=True)
class Term:
    """A literal or an expression in brackets, with `nots` times `not` before it."""

    nots: int
    item: bool | Expression

    @property
    def text(self) -> str:
        inner = str(self.item) if isinstance(self.item, bool) else f"( {self.item.text} )"
        return "not " * self.nots + inner


@dataclass(frozen=True, slots=True)
class Expression:
    """Terms, joined by `operators`, one fewer."""

    terms: tuple[Term, ...]
    operators: tuple[str, ...]

    @property
    def text(self) -> str:
        words = [self.terms[0].text]
        for operator, term in zip(self.operators, self.terms[1:], strict=True):
            words += [operator, term.text]
        return " ".join(words)


def value(expression: Expression, first: str = "and") -> bool:
    """The value if `first`, "and" or "or", binds tighter than the other. The misconception: "or"."""
    values = []
    for term in expression.terms:
        inner = term.item if isinstance(term.item, bool) else value(term.item, first)
        values.append(inner != (term.nots % 2 == 1))
    values, _ = joined(values, list(expression.operators), first)
    return all(values) if first == "or" else any(values)


def joined(values: list[bool], operators: list[str], operator: str) -> tuple[list[bool], list[str]]:
    """Replace neighbours that `operator` joins by their result.

    >>> joined([True, False, True], ["and", "or"], "and")
    ([False, True], ['or'])
    """
    left, kept = values[:1], []
    for one, following in zip(operators, values[1:], strict=True):
        if one == operator:
            left[-1] = left[-1] and following if operator == "and" else left[-1] or following
        else:
            left.append(following)
            kept.append(one)
    return left, kept


@dataclass(frozen=True, slots=True)
class BooleanQuestion:
    """Is the expression true?"""

    expression: Expression

    @property
    def prompt(self) -> str:
        return f"{self.expression.text} is"

    @property
    def answer(self) -> str:
        return str(value(self.expression))

    @property
    def is_misleading(self) -> bool:
        return value(self.expression, "or") != value(self.expression)

    def trace(self, steps: Steps) -> str:
        """Phases: each states the expression that is left after `not`, brackets, and the operators."""
        order = ("or", "and") if steps.misled else ("and", "or")
        expression, sentences = self.expression, []
        for name, simplify in (("not", _without_nots), ("brackets", _without_brackets)):
            simpler = simplify(expression, steps, order)
            if simpler != expression:
                sentences.append(f"{name}: {simpler.text}.")
                expression = simpler
        values, operators = [term.item is True for term in expression.terms], list(expression.operators)
        for operator in order:
            if operator not in operators:
                continue
            left, kept = joined(values, operators, operator)
            results = [steps.boolean(one) for one in left] if len(left) > 1 else left
            values, operators = results, kept
            if operators:
                sentences.append(f"{operator}: {_flat(values, operators).text}.")
        result = steps.boolean(values[0])
        return " ".join([*sentences, f"So the answer is {result}."])


def _flat(values: list[bool], operators: list[str]) -> Expression:
    return Expression(tuple(Term(0, one) for one in values), tuple(operators))


def _without_nots(expression: Expression, steps: Steps, order: tuple[str, str]) -> Expression:
    """Literals replace negated literals, also inside brackets."""
    terms = []
    for term in expression.terms:
        if not isinstance(term.item, bool):
            terms.append(Term(term.nots, _without_nots(term.item, steps, order)))
        elif term.nots:
            terms.append(Term(0, steps.boolean(term.item != (term.nots % 2 == 1))))
        else:
            terms.append(term)
    return Expression(tuple(terms), expression.operators)


def _without_brackets(expression: Expression, steps: Steps, order: tuple[str, str]) -> Expression:
    """Literals replace brackets, with the `not` before them."""
    terms = [
        term
        if isinstance(term.item, bool)
        else Term(0, steps.boolean(value(term.item, order[0]) != (term.nots % 2 == 1)))
        for term in expression.terms
    ]
    return Expression(tuple(terms), expression.operators)


def draw(level: int, rng: random.Random) -> BooleanQuestion:
    sizes, has_brackets = SIZES[level]
    operands = rng.choice(sizes)
    if not has_brackets:
        nots = [0] * operands
        for _ in range(rng.randint(0, MOST_NOTS)):
            nots[rng.randrange(operands)] += 1
        return BooleanQuestion(_expression([Term(n, rng.random() < 0.5) for n in nots], rng))
    inside = 2 if level == 2 else rng.choice((2, 3))
    group = _expression([_literal(rng) for _ in range(inside)], rng)
    terms = [_literal(rng) for _ in range(operands - inside)]
    terms.insert(rng.randint(0, len(terms)), Term(int(rng.random() < NEGATED), group))
    return BooleanQuestion(_expression(terms, rng))


def _literal(rng: random.Random) -> Term:
    return Term(int(rng.random() < NEGATED), rng.random() < 0.5)


def _expression(terms: list[Term], rng: random.Random) -> Expression:
    return Expression(tuple(terms), tuple(rng.choice(("and", "or")) for _ in terms[1:]))
