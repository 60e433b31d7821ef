"""The process groups of a layout, and the few functions of Megatron-Core that take them from globals instead.

Megatron's networks, data parallelism, optimizer and schedules take their groups as `pg_collection`. `_READERS` are the
functions that do not: they read the globals of `parallel_state`, which hold one set of groups. While one of them runs,
and no longer, the globals are those of the layout whose model is built or runs (`Groups.current`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache, wraps
from types import MappingProxyType
from typing import Any

from megatron.core import fp8_utils, parallel_state
from megatron.core.models.common.language_module.language_module import LanguageModule
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import transformer_block
from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout

# Of Megatron-Core 0.16.1 and 0.19.2: where the function is, its name, and what it reads.
_READERS: tuple[tuple[Any, str], ...] = (
    # Which copy of a tied output matrix this rank has, for checkpoints. With another layout's, a wrong rank writes it.
    (LanguageModule, "tie_embeddings_and_output_weights_state_dict"),
    # The pipeline stage, and whether a rank has several chunks, where stages have different numbers of layers.
    (PipelineParallelLayerLayout, "get_layer_offset"),
    # The ranks over which FP8's delayed scaling takes the largest magnitude. Without groups it takes none.
    (fp8_utils, "get_fp8_context"),
    (transformer_block, "get_fp8_context"),
)
# Not a layout's: scratch memory of Megatron's layers, and groups of a kind of data parallelism that is not used here.
_OTHERS = ("_GLOBAL_MEMORY_BUFFER", "_GLOBAL_SYMMETRIC_MEMORY_BUFFER", "_HYBRID_DP_CP_GROUPS")


class Groups(ProcessGroupCollection):
    """The process groups of a layout, by the names of Megatron's collection: `tp`, `pp`, `cp`, `dp_cp`, `ep`, ..."""

    _globals: Mapping[str, Any] = MappingProxyType({})

    @classmethod
    def of_globals(cls) -> Groups:
        """The groups that `parallel_state.initialize_model_parallel` has created."""
        _wrap_readers()
        groups: Groups = cls.use_mpu_process_groups()
        groups._globals = _globals()
        return groups

    @contextmanager
    def current(self) -> Iterator[None]:
        """Inside, these are the groups of the functions that take none."""
        before, _current[:] = _current[:], [self]
        try:
            yield
        finally:
            _current[:] = before


_current: list[Groups] = []  # one, or none outside all blocks


def clear_globals() -> None:
    """Leave no groups in the globals: what reads them outside `_READERS` fails, instead of using another layout's."""
    vars(parallel_state).update(dict.fromkeys(_globals()))


def _globals() -> dict[str, Any]:
    """Megatron's groups and what belongs to them: the `_UPPER_CASE` names at the top of parallel_state.py."""
    return {name: vars(parallel_state)[name] for name in _names()}


@cache
def _names() -> tuple[str, ...]:
    names = vars(parallel_state)
    return tuple(name for name in names if name.startswith("_") and name.isupper() and name not in _OTHERS)


@cache
def _wrap_readers() -> None:
    for place, name in _READERS:
        setattr(place, name, _with_globals(getattr(place, name)))


def _with_globals(function: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(function)
    def with_globals(*args: Any, **given: Any) -> Any:
        before = _globals()
        for groups in _current:
            vars(parallel_state).update(groups._globals)
        try:
            return function(*args, **given)
        finally:
            vars(parallel_state).update(before)

    return with_globals
