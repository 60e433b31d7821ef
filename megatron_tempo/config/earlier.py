"""Fields of earlier versions: what an override of one is told, and how a recorded configuration that has it is read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_tempo.config.correction import CorrectionLevel
from megatron_tempo.config.problem import show

# Fields that were renamed, by their old paths.
RENAMED = {
    "run.max_skipped": "run.max_consecutive_nonfinite_steps",
    "model.bf16_ends": "model.num_bf16_layers_at_ends",
}
_CAP = "importance_cap"  # of a stage's actor; now a correction of tokens


def replacement(path: str, value: Any) -> tuple[str, str] | None:
    """What is wrong with a field of an earlier version, and the fix. None for any other field.

    >>> replacement("stage1.actor.importance_cap", 2)
    ('is now stage1.actor.correction', 'stage1.actor.correction.level=token and stage1.actor.correction.high=2')
    """
    if path in RENAMED:
        return f"is now {RENAMED[path]}", f"{RENAMED[path]}={show(value)}"
    if path in (f"stage1.actor.{_CAP}", f"stage2.actor.{_CAP}"):
        new = path.replace(_CAP, "correction")
        fix = f"{new}.level=null" if value is None else f"{new}.level=token and {new}.high={show(value)}"
        return f"is now {new}", fix
    return None


def stage_of_now(stage: Mapping[str, Any]) -> Mapping[str, Any]:
    """A recorded stage with the fields of this version."""
    actor = stage.get("actor")
    if not isinstance(actor, Mapping) or _CAP not in actor or "correction" in actor:
        return stage
    kept = {name: value for name, value in actor.items() if name != _CAP}
    if actor[_CAP] is not None:
        kept["correction"] = {"level": CorrectionLevel.token.name, "high": actor[_CAP]}
    return {**stage, "actor": kept}
