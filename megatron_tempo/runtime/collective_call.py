"""Run a rank-local action, such as writing a file. If it fails on any rank, raise on all of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
import torch.distributed as dist

from megatron_tempo.errors import InputError, UnwrittenError

_T = TypeVar("_T")
_FIX = "free disk space, or make the directory writable"


def raise_on_all_ranks(act: Callable[[], _T], group: dist.ProcessGroup | None = None) -> _T:
    """Run `act()`, which must contain no collective call. Collective over `group`, which contains all ranks.

    If it fails on one rank, all ranks raise: UnwrittenError for its OSError, InputError for its InputError. Otherwise
    the other ranks would wait for the failed one until their next collective call times out.
    """
    failure: tuple[bool, str] | None = None
    try:
        done = act()
    except OSError as error:
        what = f"{error.filename}: {error.strerror}" if error.filename else str(error)
        failure = (True, f"{what}; {_FIX}")
    except InputError as error:
        failure = (False, str(error))
    failed = torch.tensor(int(failure is not None))
    dist.all_reduce(failed, op=dist.ReduceOp.MAX, group=group)
    if not failed:
        return done
    failures: list[tuple[bool, str] | None] = [None] * dist.get_world_size()
    dist.all_gather_object(failures, failure, group=group)
    unwritten, words = next(failure for failure in failures if failure is not None)
    raise UnwrittenError(words) if unwritten else InputError(words)
