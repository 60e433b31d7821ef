"""Rotary embeddings as a config.json describes them."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any

from megatron_tempo.config.json_entries import expect, is_number, number, unsupported
from megatron_tempo.errors import InputError


@dataclass(frozen=True, slots=True)
class Yarn:
    """How YaRN (arXiv 2309.00071) stretches a rotary embedding to sequences longer than it was trained on.

    >>> Yarn(factor=8.0, trained_positions=8192, beta_fast=32.0, beta_slow=1.0, attention_factor=1.2079)
    """

    factor: float  # by how much
    trained_positions: int
    beta_fast: float  # pairs that turn more often than this over the trained positions keep their frequency
    beta_slow: float  # pairs that turn less often are slowed by `factor`
    attention_factor: float  # scales rotated queries and rotated keys


@dataclass(frozen=True, slots=True)
class Llama3:
    """How Llama 3.1 stretches a rotary embedding to sequences longer than it was trained on.

    Between the two numbers of turns, the share of the slowed frequency falls linearly with the turns.

    >>> Llama3(factor=8.0, trained_positions=8192, low_freq_factor=1.0, high_freq_factor=4.0)
    """

    factor: float  # by how much
    trained_positions: int
    low_freq_factor: float  # pairs that turn less often than this over the trained positions are slowed by `factor`
    high_freq_factor: float  # pairs that turn more often keep their frequency


@dataclass(frozen=True, slots=True)
class Rope:
    """A rotary embedding: pair i of a head's d numbers turns by theta^(-2i/d) radians per position, before scaling."""

    theta: float
    scaling: Yarn | Llama3 | None = None


_PLAIN_ROPE = {"rope_type", "type", "rope_theta"}
_TRAINED = "original_max_position_embeddings"
_SCALING = {  # the entries of each type
    "yarn": {"factor", _TRAINED, "beta_fast", "beta_slow", "attention_factor"},
    "llama3": {"factor", _TRAINED, "low_freq_factor", "high_freq_factor"},
}
_AS_USUAL = {"partial_rotary_factor": 1.0, "truncate": True}  # the default of transformers


def read_rope(field: str, parameters: dict[str, Any], max_positions: int, known: tuple[str, ...]) -> Rope:
    """The rotary embedding of the entry `field` of a config.json. `known`: the types that the family may have.

    Raises InputError, which names the field.
    """
    rope_type = parameters.get("rope_type", parameters.get("type", "default"))
    if rope_type not in known:
        raise unsupported(f"{field}.rope_type", rope_type, known[-1])
    for name in sorted(parameters.keys() - _PLAIN_ROPE - _SCALING.get(rope_type, set())):
        expect(f"{field}.{name}", parameters[name], _AS_USUAL.get(name))
    theta = number(f"{field}.rope_theta", parameters["rope_theta"])
    if rope_type not in _SCALING:
        return Rope(theta)
    parameters = {_TRAINED: max_positions} | parameters
    for name in ("factor", _TRAINED):
        if not is_number(parameters.get(name)) or parameters[name] < 1:
            raise InputError(f"{field}.{name}={json.dumps(parameters.get(name))} must be a number of at least 1")
    return Rope(theta, (_yarn if rope_type == "yarn" else _llama3)(field, parameters))


def _yarn(field: str, parameters: dict[str, Any]) -> Yarn:
    factor = float(parameters["factor"])
    return Yarn(
        factor=factor,
        trained_positions=parameters[_TRAINED],
        beta_fast=number(f"{field}.beta_fast", parameters.get("beta_fast") or 32.0),
        beta_slow=number(f"{field}.beta_slow", parameters.get("beta_slow") or 1.0),
        attention_factor=number(
            f"{field}.attention_factor", parameters.get("attention_factor", 0.1 * math.log(factor) + 1.0)
        ),
    )


def _llama3(field: str, parameters: dict[str, Any]) -> Llama3:
    low, high = (number(f"{field}.{name}", parameters.get(name)) for name in ("low_freq_factor", "high_freq_factor"))
    if high <= low:
        raise InputError(f"{field}.high_freq_factor={high} must be above low_freq_factor={low}")
    return Llama3(float(parameters["factor"]), parameters[_TRAINED], low, high)
