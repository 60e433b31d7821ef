"""Megatron-Core's functions that read process groups from globals: what the globals are while they run."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import pytest
from megatron.core import fp8_utils, parallel_state

from megatron_tempo.models.megatron_compat import process_groups
from megatron_tempo.models.megatron_compat.process_groups import Groups, clear_globals

GROUP = "_TENSOR_MODEL_PARALLEL_GROUP"


@pytest.fixture(autouse=True)
def unchanged() -> Iterator[None]:
    """Megatron's globals are what they were."""
    before = dict(vars(parallel_state))
    yield
    vars(parallel_state).update(before)


def groups_of(name: str) -> Groups:
    groups = Groups(tp=name)
    groups._globals = {GROUP: name}
    return groups


def read(fails: bool = False) -> Any:
    """Stands for one of Megatron's functions."""
    if fails:
        raise ValueError(vars(parallel_state)[GROUP])
    return vars(parallel_state)[GROUP]


def test_the_globals_are_the_current_layouts_while_a_reader_runs() -> None:
    actor, critic = groups_of("actor's"), groups_of("critic's")
    reader = process_groups._with_globals(read)
    vars(parallel_state)[GROUP] = "nobody's"
    with actor.current():
        assert (reader(), read()) == ("actor's", "nobody's")
        with critic.current():
            assert (reader(), read()) == ("critic's", "nobody's")
            with pytest.raises(ValueError, match="critic's"):
                reader(fails=True)
            assert read() == "nobody's"
        assert reader() == "actor's"
    assert reader() == "nobody's", "outside all blocks it reads what is there"


def test_groups_of_no_run_change_nothing() -> None:
    vars(parallel_state)[GROUP] = "a run's"
    with Groups().current():
        assert process_groups._with_globals(read)() == "a run's"


def test_cleared_globals_have_no_group_but_the_scratch_memory() -> None:
    vars(parallel_state).update({GROUP: "somebody's", "_GLOBAL_MEMORY_BUFFER": "all layouts'"})
    clear_globals()
    assert parallel_state.get_global_memory_buffer() == "all layouts'"
    with pytest.raises(AssertionError):
        parallel_state.get_tensor_model_parallel_group()
    assert not parallel_state.model_parallel_is_initialized()


def test_each_wrapped_function_reads_globals_in_the_installed_version() -> None:
    """What a later version gives its groups as arguments needs no wrapper."""
    for place, name in process_groups._READERS:
        function = inspect.unwrap(getattr(place, name))
        in_file = inspect.getsource(fp8_utils) if name == "get_fp8_context" else inspect.getsource(function)
        assert "parallel_state." in in_file, name
