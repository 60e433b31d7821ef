"""Reads the fixes of a configuration's problems as a user would, so that a test can try each of them."""

from __future__ import annotations

import re
import shlex

from megatron_tempo.config import Problem

# What a user puts in place of the words in capitals; TMP is the folder of `config_files.write_all`.
PLACEHOLDERS = {
    "run.dir": "TMP/elsewhere",
    "model.path": "TMP/model",
    "model.critic_path": "TMP/critic",
    "data.labelled.path": "TMP/labelled.jsonl",
    "data.unlabelled.path": "TMP/unlabelled.jsonl",
    "evaluation.sets.heldout.path": "TMP/heldout.jsonl",
    "rollout.servers.python": "sh",
    "data.labelled.answer_field": "answer",
    "evaluation.sets.heldout.answer_field": "answer",
}
_OVERRIDE = re.compile(r"(?<![\w.])'?([a-z_]\w*(?:\.[\w\[\]]+)*)=('\"[^\"]*\"'|\"[^\"]*\"'|\[[^\]]*\]|[^\s;?]+)")
_MORE = re.compile(r"(?: or |, or |, )([\w.\-]+)(?=$|[,;?:]| or | \()")
_BOUND = re.compile(r"([a-z_]\w*(?:\.\w+)+) (below|above) (-?[\d.e+]+)")
_MEANT = re.compile(r"(?:did you mean|one of) (.*?)(?:\?|;|$)")


def offers(problem: Problem) -> list[list[str]]:
    """The alternatives that a fix offers, each a list of overrides to be given together."""
    offered: list[list[str]] = []
    text, end = problem.fix, 0
    for match in _OVERRIDE.finditer(text):
        key, value = match[1], match[2].rstrip(",.:)")
        rest = text[match.start(2) + len(value) :]
        values = _values(value, rest)
        words = [_written(key, one) for one in values]
        if offered and text[end : match.start()].strip(" '") == "and":
            offered[-1] += words
        else:
            offered += [[word] for word in words]
        end = match.start(2) + len(value)
    for key, side, number in _BOUND.findall(text):
        step = -1 if side == "below" else 1
        offered.append([f"{key}={float(number) + step:.12g}"])
    if not offered and (match := _MEANT.search(text)):
        names = re.split(r", | or ", match[1])
        value = problem.value if not isinstance(problem.value, list) else None
        unknown = problem.wrong == "there is no such field"
        offered = [[f"{name}={value}" if unknown else f"{problem.field}={name}"] for name in names]
    return offered


def _values(value: str, rest: str) -> list[str]:
    if value == "one" and (listed := re.match(r" of ((?:[\w.\-]+(?:, )?)+)", rest)):
        return listed[1].rstrip(", ").split(", ")
    if value == "a" and (multiple := re.match(r" multiple of (\d+)", rest)):
        return [multiple[1]]
    values = [value]
    rest = re.sub(r"^ or (more|less)", "", rest)
    while more := _MORE.match(rest):
        values += [more[1]] if more[1] not in ("more", "less") else []
        rest = rest[more.end() :]
    return values


def _written(key: str, value: str) -> str:
    """The override as a shell hands it on, with a user's value for a word in capitals."""
    if re.match(r"[A-Z]{4}", value):
        return f"{key}={PLACEHOLDERS.get(key, value)}"
    if value.startswith('"') and value.endswith("'"):  # 'KEY="VALUE"', whose first quote is before the key
        value = value[:-1]
        return f"{key}={value}"
    return shlex.split(f"{key}={value}")[0] if value.startswith("'") else f"{key}={value}"
