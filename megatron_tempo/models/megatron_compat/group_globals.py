"""Reads and replaces Megatron-Core's process groups, which are globals of `parallel_state`, as one set."""

from __future__ import annotations

from typing import Any

from megatron.core import parallel_state


def read_group_globals() -> dict[str, Any]:
    """The process groups that Megatron uses now.

    Megatron-Core 0.16.1 (parallel_state.py, the `_UPPER_CASE` globals at its top). A process has one set of groups, and
    there is no public way to replace it. Without this, actor and critic cannot have different layouts.
    """
    return {name: value for name, value in vars(parallel_state).items() if name.isupper()}


def write_group_globals(groups: dict[str, Any]) -> None:
    """Let Megatron use the process groups that `read_group_globals` returned earlier."""
    vars(parallel_state).update(groups)
