"""A folder that is written in parts. The program may be killed at any moment; a rerun resumes after the last part.

OUT.partial/
    inputs.json    what the content depends on
    whole/         the parts that are written
    done/NAME      a note for each complete part, with its bytes
OUT                appears when all parts are complete; OUT.partial is then removed
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from megatron_tempo.errors import InputError
from megatron_tempo.files import partial_of, publish_folder, read_json, replace_file, temporaries_in

_INPUTS = "inputs.json"


class ResumableFolder:
    """A folder that is being written. Nothing is written before `begin`."""

    def __init__(self, out: Path, inputs: dict[str, Any]) -> None:
        """`inputs`: all that the folder's content depends on, as JSON data.

        Raises InputError if the folder exists, or if its existing parts were made from other inputs.
        """
        self._out, self._partial = out, partial_of(out)
        self._inputs = json.loads(json.dumps(inputs))
        self.whole, self._done = self._partial / "whole", self._partial / "done"
        if out.exists() or out.is_symlink():
            raise InputError(f"{out} exists: move it away, or choose another name")
        if self.resumes:
            self._compare()

    @property
    def resumes(self) -> bool:
        """Whether an earlier call has begun it."""
        return self._partial.exists() and {*self._partial.iterdir()} > {*temporaries_in(self._partial)}

    def _compare(self) -> None:
        try:
            before = read_json(self._partial / _INPUTS, dict)
        except InputError as error:
            raise InputError(
                f"{self._partial} was not written by this program ({error}): remove it, or move it away"
            ) from error
        if other := [name for name, now in self._inputs.items() if before.get(name) != now]:
            raise InputError(
                f"{self._partial} was begun with other inputs ({_changed(other[0], before, self._inputs)}): "
                "remove it to start over, or give the inputs that it was begun with"
            )

    def begin(self, nbytes: int) -> None:
        """Begin or resume. `nbytes`: the folder's final size. Raises InputError if there is too little disk space."""
        written = sum(path.stat().st_size for path in self.whole.glob("*")) if self.whole.exists() else 0
        there = next(path for path in self._out.absolute().parents if path.exists())
        free = shutil.disk_usage(there).free
        if free < nbytes - written:
            raise InputError(
                f"{there} has {free / 2**30:.2f} GiB free, and {self._out} needs {(nbytes - written) / 2**30:.2f} GiB: "
                "free disk space, or choose another folder"
            )
        if not self.resumes:
            self._partial.mkdir(parents=True, exist_ok=True)
            replace_file(self._partial / _INPUTS, json.dumps(self._inputs, indent=1), fsync=True)
        for folder in (self.whole, self._done):
            folder.mkdir(exist_ok=True)
            for abandoned in temporaries_in(folder):
                abandoned.unlink()

    def note(self, name: str) -> dict[str, Any] | None:
        """The note of a complete file in `whole`; None if the file has yet to be written."""
        path = self.whole / name
        try:
            note = read_json(self._done / name, dict)
            return note if path.stat().st_size == note.get("bytes") else None
        except (OSError, InputError):  # written again
            return None

    def mark(self, name: str, **note: Any) -> None:
        """Record that a file in `whole` is complete, with `note`, which `self.note` returns."""
        note |= {"bytes": (self.whole / name).stat().st_size}
        replace_file(self._done / name, json.dumps(note), fsync=True)

    def finish(self) -> int:
        """Rename the folder to its final name. Returns its bytes."""
        size = sum(path.stat().st_size for path in self.whole.iterdir())
        publish_folder(self.whole, self._out)
        shutil.rmtree(self._partial)
        return size


def _changed(name: str, before: dict[str, Any], after: dict[str, Any]) -> str:
    was, now = before.get(name), after[name]
    if not isinstance(was, dict):
        return f"{name} was {was}, is {now}"
    changed = sorted(key for key in {*was, *now} if was.get(key) != now.get(key))
    return f"{name}: {', '.join(changed[:3])}{' ...' * (len(changed) > 3)} changed"
