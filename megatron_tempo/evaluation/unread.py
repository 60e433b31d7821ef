"""Why nothing in an evaluation is right: the model, or a verifier that cannot read what it is given."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_tempo.config.choices import Verifier
from megatron_tempo.evaluation.evaluator import ScoredResponses
from megatron_tempo.rewards.scorer import Item
from megatron_tempo.rewards.verifiers import Verifiers

TRIED = 256  # responses that other verifiers are tried on
_SHOWN = 200  # characters of a response
# Verifiers that work by rules: they have no cost but time, and say which responses they cannot read.
_BY_RULES = tuple(verifier.name for verifier in Verifier if verifier is not Verifier.judge)


def diagnose(name: str, scored: ScoredResponses, texts: Sequence[str], verifiers: Verifiers) -> tuple[str | None, bool]:
    """What to say of the set `name`, none of whose responses is right, and whether its scores are meaningless.

    None if a response is right. `texts` are the responses as the verifier read them, question after question. The
    scores are meaningless if no response could be read, or if another verifier finds right ones.
    """
    if scored.correct.any():
        return None, False
    samples = scored.correct.shape[1]
    items = [
        Item(prompt.verifier, prompt.text, text, prompt.answer)
        for i, prompt in enumerate(scored.prompts)
        for text in texts[i * samples : (i + 1) * samples]
    ]
    field, used = f"evaluation.sets.{name}", ", ".join(sorted({item.verifier for item in items}))
    first = f"the first response is {_short(items[0].response)!r}, the answer {_short(items[0].answer)!r}"
    other = _other_verifier(items, verifiers)
    if other is not None:
        better, right, tried = other
        return (
            f"{name}: none of the {len(items)} responses is right by the verifier {used}, but {right} of {tried} are "
            f"by {better}: give {field}.verifier={better}"
        ), True
    if not _is_any_read(items, verifiers):
        cut = 1.0 - float(scored.batch.stopped.double().mean())
        why = f"{cut:.0%} of them are cut off: raise evaluation.max_response_tokens; or " if cut else ""
        return (
            f"{name}: none of the {len(items)} responses could be read by the verifier {used} ({first}); {why}"
            f"give the verifier and the prompt form that the model was trained with: {field}.verifier, .suffix, "
            f".chat_template, .system"
        ), True
    return f"warning: {name}: none of the {len(items)} responses is right by the verifier {used}; {first}", False


def _is_any_read(items: Sequence[Item], verifiers: Verifiers) -> bool:
    """Whether an answer could be read from a response, or cannot be known to be unread: by a judge, or a user's own."""
    return any(
        item.verifier not in _BY_RULES or verifiers.classes(item.verifier, item.prompt, [item.response]) != [None]
        for item in items
    )


def _other_verifier(items: Sequence[Item], verifiers: Verifiers) -> tuple[str, int, int] | None:
    """The verifier by which most responses are right, how many are, and of how many; None if none are by any."""
    every = max(len(items) // TRIED, 1)
    rights = []
    for name in _BY_RULES:
        tried = [
            Item(name, item.prompt, item.response, item.answer) for item in items[::every] if item.verifier != name
        ]
        try:
            right = int(sum(verifiers.score(tried)))
        except ValueError:  # the questions or answers are none of this verifier's
            continue
        rights.append((name, right, len(tried)))
    best = max(rights, key=lambda one: one[1], default=None)
    return best if best is not None and best[1] > 0 else None


def _short(text: str) -> str:
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
