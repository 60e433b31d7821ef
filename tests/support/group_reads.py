"""Refuses reads of Megatron-Core's process groups from the globals of `parallel_state`."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import CodeType, FrameType, FunctionType

from megatron.core import parallel_state

# Inside these of our functions the globals are a layout's: where groups are made, and around Megatron's readers.
INSIDE = ("initialize_model_parallel", "with_globals")


def refuse_group_reads() -> None:
    """From now on, a function of this process that reads a layout's group, rank or size from the globals fails.

    It raises AssertionError with the name of the function. The code of Megatron's getters is replaced, because other
    modules import them by name.
    """
    functions = [one for one in vars(parallel_state).values() if isinstance(one, FunctionType)]
    for getter in [one for one in functions if one.__module__ == parallel_state.__name__]:
        name = getter.__name__
        if name.startswith(("get_", "is_", "model_parallel_is_")) and f"_unwatched_{name}" not in vars(parallel_state):
            original = FunctionType(getter.__code__, getter.__globals__, name, getter.__defaults__)
            vars(parallel_state)[f"_unwatched_{name}"] = original
            getter.__code__, getter.__defaults__ = _reporting(name), None
    vars(parallel_state)["_report_read"] = _check


def _reporting(name: str) -> CodeType:
    """The code of a getter that reports a call, and then is what it was."""
    made: dict[str, FunctionType] = {}
    exec(f"def {name}(*args, **given):\n _report_read('{name}')\n return _unwatched_{name}(*args, **given)", made)
    return made[name].__code__


def _check(getter: str) -> None:
    frames = _callers(sys._getframe(2))
    reader = next(frames)
    if reader.f_globals is vars(parallel_state) or _is_of_no_layout(getter, reader):
        return
    if not any(frame.f_code.co_name in INSIDE for frame in frames):
        raise AssertionError(f"{reader.f_code.co_filename}: {reader.f_code.co_name} calls {getter}")


def _is_of_no_layout(getter: str, reader: FrameType) -> bool:
    """Whether a call reads what no layout has, or what all may share.

    Groups that shard weights ("gtp"), and scratch memory. A function that has its group asks whether there are globals.
    So does a row-parallel layer, which needs no group there and takes that of the globals if they exist.
    A stage in the middle of a pipeline looks for a group of embeddings, which its layout's globals do not have either.
    """
    if "gtp" in getter or getter == "get_global_memory_buffer":
        return True
    if reader.f_code.co_name in ("_allreduce_word_embedding_grads", "_allreduce_position_embedding_grads"):
        return True
    if reader.f_code.co_name != "get_tensor_model_parallel_group_if_none":
        return False
    assert reader.f_back is not None
    given = reader.f_back.f_locals
    needs_none = (given.get("sequence_parallel"), given.get("allreduce_dgrad")) == (False, False)
    return reader.f_locals["tp_group"] is not None or needs_none


def _callers(frame: FrameType | None) -> Iterator[FrameType]:
    while frame is not None:
        yield frame
        frame = frame.f_back
