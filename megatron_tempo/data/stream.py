"""An endless, shuffled, resumable stream of prompts."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import numpy as np

from megatron_tempo.errors import InputError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

P = TypeVar("P", bound="DataclassInstance")


class PromptStream(Generic[P]):
    """Epoch after epoch of `prompts`, each in its own order, the same on every rank.

    The order of an epoch depends only on (seed, name, epoch). If an epoch ends inside a `take`, the take continues with
    the next epoch; prompts of that epoch that the take already has move to the start of the following take. So a take
    of at most `len(prompts)` has no prompt twice, and every prompt occurs once per epoch.
    """

    def __init__(self, prompts: Sequence[P], seed: int, name: str) -> None:
        if not prompts:
            raise InputError(f"the {name} set has no prompts; a stream needs at least one")
        self._prompts = prompts
        self._seed = seed
        self._name = name
        self._fingerprint = fingerprint(prompts)
        self._cursor = 0  # position in the epochs' orders, including postponed prompts
        self._put_off: list[int] = []
        self._epoch = 0
        self._order = self._shuffled(0)

    def take(self, count: int) -> list[P]:
        """The next `count` prompts."""
        return self.at(self.draw(count))

    def draw(self, count: int) -> list[int]:
        """The places of the next `count` prompts in the set."""
        assert count >= 0
        indices: list[int] = []
        while len(indices) < count:
            indices += self._draw(min(count - len(indices), len(self._prompts)))
        return indices

    def at(self, indices: Iterable[int]) -> list[P]:
        """The prompts at these places in the set."""
        return [self._prompts[i] for i in indices]

    def first(self, count: int) -> list[P]:
        """The first `count` prompts of the set, without taking them."""
        return list(self._prompts[:count])

    def state(self) -> dict[str, Any]:
        """The stream's position for `restore`, as JSON data."""
        return {
            "drawn": self._cursor - len(self._put_off),
            "put_off": list(self._put_off),
            "seed": self._seed,
            "fingerprint": self._fingerprint,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Resume at the position of `state`. Raises ValueError if it is of another seed or other prompts."""
        if state["seed"] != self._seed:
            raise InputError(
                f"the {self._name} stream was saved with run.seed={state['seed']}, now it is {self._seed}; "
                "set it back, or start a new run"
            )
        if state["fingerprint"] != self._fingerprint:
            raise InputError(
                f"the {self._name} prompts are not those of the checkpoint: the file, its fields, the tokenizer or the "
                "chat template changed; bring the old ones back, or start a new run"
            )
        self._put_off = list(state["put_off"])
        self._cursor = state["drawn"] + len(self._put_off)

    def _draw(self, count: int) -> list[int]:
        """The next `count` indices, all different. `count` is at most the number of prompts."""
        indices, self._put_off = self._put_off[:count], self._put_off[count:]
        seen = set(indices)
        while len(indices) < count:
            index = self._next()
            if index in seen:
                self._put_off.append(index)
            else:
                seen.add(index)
                indices.append(index)
        return indices

    def _next(self) -> int:
        epoch, position = divmod(self._cursor, len(self._prompts))
        if epoch != self._epoch:
            self._epoch, self._order = epoch, self._shuffled(epoch)
        self._cursor += 1
        return int(self._order[position])

    def _shuffled(self, epoch: int) -> np.ndarray:
        """The order of an epoch: int64 [number of prompts]."""
        digest = hashlib.sha256(json.dumps([self._seed, self._name, epoch]).encode()).digest()
        generator = np.random.Philox(np.random.SeedSequence(int.from_bytes(digest, "big")))
        # numpy guarantees that raw numbers stay the same in later versions, but not those of `permutation`.
        return np.argsort(generator.random_raw(len(self._prompts)), kind="stable")


def fingerprint(prompts: Sequence[DataclassInstance]) -> str:
    """A hash over every field of every prompt, in order."""
    digest = hashlib.sha256()
    for prompt in prompts:
        values = [getattr(prompt, field.name) for field in dataclasses.fields(prompt)]
        digest.update(json.dumps(values).encode())
    return digest.hexdigest()
