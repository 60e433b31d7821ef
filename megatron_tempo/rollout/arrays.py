"""Tokens and log-probabilities that something else returns (a server, a user's engine, a file) as tensors."""

from __future__ import annotations

from collections.abc import Sequence
from operator import index
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_INT32 = np.iinfo(np.int32)


def token_tensor(values: object) -> Tensor:
    """Token ids as int32 [t], in memory of its own. `values`: a sequence of integers, an array or a tensor.

    Raises ValueError if they are something else.
    """
    array = _array("token_ids", values, "iu", (int, np.integer))
    if array.size and not _INT32.min <= int(array.min()) <= int(array.max()) <= _INT32.max:
        raise ValueError("a token out of the vocabulary")
    return torch.from_numpy(array.astype(np.int32))


def logprob_tensor(values: object) -> Tensor:
    """Log-probabilities as float32 [t], in memory of its own. `values`: a sequence of numbers, an array or a tensor.

    Raises ValueError if they are something else.
    """
    with np.errstate(over="ignore"):  # becomes infinite, which the checks of completions see
        return torch.from_numpy(
            _array("logprobs", values, "iuf", (int, float, np.integer, np.floating)).astype(np.float32)
        )


def expert_tensor(values: object, itemsize: int) -> Tensor:
    """Numbers of experts as uint8 or int16 [tokens, layers, k], in memory of its own. `values`: an array or a tensor.

    Raises ValueError if they are something else, or do not fit.
    """
    array = values.detach().cpu().numpy() if isinstance(values, Tensor) else values
    if not isinstance(array, np.ndarray) or array.ndim != 3 or array.dtype.kind not in "iu":
        raise ValueError(f"experts is {_shown(values)}, not an array of integers [tokens, layers, k]")
    kept = array.astype(np.uint8) if itemsize == 1 else array.astype(np.int16)
    if not np.array_equal(kept, array):
        raise ValueError(f"experts has numbers that {kept.dtype} does not hold")
    return torch.from_numpy(kept)


def run_tuples(versions: Any) -> tuple[tuple[int, int], ...]:
    """Runs of versions as (version, number of tokens). Raises ValueError if they are something else."""
    try:
        runs = tuple((index(version), index(tokens)) for version, tokens in versions)
    except (TypeError, ValueError) as error:
        raise ValueError(f"versions is {_shown(versions)}, not (version, number of tokens) in order") from error
    if any(tokens < 0 for _, tokens in runs):
        raise ValueError(f"versions has a negative number of tokens: {_shown(versions)}")
    return runs


def _array(name: str, values: Any, kinds: str, types: tuple[type, ...]) -> NDArray[Any]:
    """The values as an array [t] of one of these `kinds` of numpy; members of a sequence are of these `types`."""
    if isinstance(values, Tensor):
        values = values.detach().cpu()
        array = (values.float() if values.is_floating_point() else values).numpy()  # numpy has no bfloat16
    elif isinstance(values, np.ndarray):
        array = values
    elif isinstance(values, Sequence):
        if wrong := {kind for kind in set(map(type, values)) if kind is bool or not issubclass(kind, types)}:
            raise ValueError(f"{name} has {_shown(next(v for v in values if type(v) in wrong))}")
        array = np.asarray(values)
    else:
        raise ValueError(f"{name} is {_shown(values)}, not a sequence of numbers")
    if array.ndim != 1 or (array.size and array.dtype.kind not in kinds):
        if array.dtype.kind == "O":  # integers that no type of numpy holds
            raise ValueError(f"{name} has numbers that are too large")
        raise ValueError(f"{name} is an array {array.dtype.name} {list(array.shape)}, not numbers in a row")
    return array


def _shown(value: object) -> str:
    text = repr(value)
    return f"{text[:80]}{'...' if len(text) > 80 else ''}" + ("" if value is None else f" ({type(value).__name__})")
