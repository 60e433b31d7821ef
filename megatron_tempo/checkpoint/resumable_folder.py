"""A folder that is made in parts, by a program that may be killed at any moment and goes on where it was.

OUT.partial/
    inputs.json    what it is made of
    whole/         the folder as far as it is made
    done/NAME      a note for each part that is whole, with its bytes
OUT                appears when all parts are there; OUT.partial is then gone
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from megatron_tempo.errors import InputError
from megatron_tempo.weights.files import TEMPORARY, atomic, sync, sync_folder

_INPUTS = "inputs.json"


class ResumableFolder:
    """A folder in the making. Nothing is written before `begin`."""

    def __init__(self, out: Path, inputs: dict[str, Any]) -> None:
        """`inputs`, JSON-able: all that the folder's content depends on.

        Raises InputError if the folder exists, or if what is there of it was made of something else.
        """
        self._out, self._partial = out, out.with_name(out.name + ".partial")
        self._inputs = json.loads(json.dumps(inputs))
        self.whole, self._done = self._partial / "whole", self._partial / "done"
        if out.exists() or out.is_symlink():
            raise InputError(f"{out} exists: move it away, or choose another name")
        if self.resumes:
            self._compare()

    @property
    def resumes(self) -> bool:
        """Whether an earlier call began it."""
        return self._partial.exists() and any(path.suffix != TEMPORARY for path in self._partial.iterdir())

    def _compare(self) -> None:
        try:
            before = json.loads((self._partial / _INPUTS).read_text())
        except (OSError, ValueError) as error:
            raise InputError(f"{self._partial} is not of this program ({error}): remove it, or move it away") from error
        if other := [name for name, now in self._inputs.items() if before.get(name) != now]:
            raise InputError(
                f"{self._partial} was begun with another input ({_changed(other[0], before, self._inputs)}): "
                "remove it to begin anew, or give the inputs that it was begun with"
            )

    def begin(self, nbytes: int) -> None:
        """Begin or go on. `nbytes`: what the folder will hold. Raises InputError if the disk has too little room."""
        written = sum(path.stat().st_size for path in self.whole.glob("*")) if self.whole.exists() else 0
        there = next(path for path in self._out.absolute().parents if path.exists())
        free = shutil.disk_usage(there).free
        if free < nbytes - written:
            raise InputError(
                f"{there} has {free / 2**30:.2f} GiB free, and {self._out} needs {(nbytes - written) / 2**30:.2f} GiB: "
                "make room, or choose another place"
            )
        if not self.resumes:
            self._partial.mkdir(parents=True, exist_ok=True)
            with atomic(self._partial / _INPUTS) as file:
                file.write(json.dumps(self._inputs, indent=1).encode())
        for folder in (self.whole, self._done):
            folder.mkdir(exist_ok=True)
            for abandoned in folder.glob(f"*{TEMPORARY}"):
                abandoned.unlink()

    def note(self, name: str) -> dict[str, Any] | None:
        """The note of a file below `whole` that is done; none if it is to be written."""
        path = self.whole / name
        try:
            note: dict[str, Any] = json.loads((self._done / name).read_text())
            return note if path.stat().st_size == note["bytes"] else None
        except OSError:
            return None

    def mark(self, name: str, **note: Any) -> None:
        """Note that a file below `whole` is done; `note` comes back from `note`."""
        with atomic(self._done / name) as file:
            file.write(json.dumps(note | {"bytes": (self.whole / name).stat().st_size}).encode())

    def finish(self) -> int:
        """The folder under its name. Returns its bytes."""
        sync(self.whole)
        size = sum(path.stat().st_size for path in self.whole.iterdir())
        os.replace(self.whole, self._out)
        sync_folder(self._out.absolute().parent)
        shutil.rmtree(self._partial)
        return size


def _changed(name: str, before: dict[str, Any], after: dict[str, Any]) -> str:
    was, now = before.get(name), after[name]
    if not isinstance(was, dict):
        return f"{name} was {was}, is {now}"
    changed = sorted(key for key in {*was, *now} if was.get(key) != now.get(key))
    return f"{name}: {', '.join(changed[:3])}{' ...' * (len(changed) > 3)} changed"
