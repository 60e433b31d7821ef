"""What a part finds: figures, comparisons and notes, one JSON object a line."""

from __future__ import annotations

import json
import math
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from enum import Enum
from pathlib import Path
from typing import TextIO


class Verdict(Enum):
    """The outcome of a comparison."""

    passed = "passed"
    failed = "FAILED"
    unchecked = "not checked (null GPU)"


@dataclass(frozen=True, slots=True)
class Record:
    """A figure, a comparison (`verdict`), or a note (`value` is a text).

    >>> Record("logprobs error", 3.1e-7, bound="at most 1e-05", verdict="passed")
    """

    name: str
    value: float | str
    unit: str = ""
    bound: str = ""
    verdict: str = ""

    def printed(self) -> str:
        value = self.value if isinstance(self.value, str) else f"{self.value:.4g}"
        words = [f"{self.name}: {value}", self.unit, f"({self.bound})" if self.bound else "", self.verdict]
        return " ".join(word for word in words if word)


class Records:
    """Writes the records of a part to a file. `has_numbers`: False on the null GPU, where nothing is compared."""

    def __init__(self, file: TextIO, *, has_numbers: bool = True) -> None:
        self._file, self.has_numbers = file, has_numbers

    def figure(self, name: str, value: float, unit: str = "") -> None:
        """A number that nothing is compared with."""
        self._write(Record(name, value, unit))

    def note(self, name: str, text: str) -> None:
        self._write(Record(name, text))

    def at_most(self, name: str, value: float, bound: float, unit: str = "") -> None:
        """A number that may be `bound` or less. NaN fails."""
        self._compare(Record(name, value, unit, f"at most {bound:.4g}"), passed=value <= bound)

    def between(
        self, name: str, value: float, least: float, most: float, unit: str = "", *, numeric: bool = True
    ) -> None:
        """A number that may be from `least` to `most`. NaN fails. `numeric`: see `holds`."""
        record = Record(name, value, unit, f"{least:.4g} to {most:.4g}")
        self._compare(record, passed=least <= value <= most, numeric=numeric)

    def holds(self, name: str, condition: bool, text: str = "", *, numeric: bool = True) -> None:
        """A condition. `numeric`: whether it depends on what the GPU computes, which the null GPU does not."""
        value = text or ("yes" if condition else "no")
        self._compare(Record(name, value), passed=condition, numeric=numeric)

    @contextmanager
    def attempt(self, name: str) -> Iterator[None]:
        """One case of a part. An exception in it is a failed record, and the part continues. On every device."""
        try:
            yield
        except Exception as error:  # noqa: BLE001 (whatever a case raises is its result)
            traceback.print_exc()
            words = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            self.holds(f"{name}: runs to its end", False, words, numeric=False)

    def _compare(self, record: Record, *, passed: bool, numeric: bool = True) -> None:
        verdict = Verdict.passed if passed else Verdict.failed
        if numeric and not self.has_numbers:
            verdict = Verdict.unchecked
        self._write(Record(record.name, record.value, record.unit, record.bound, verdict.value))

    def _write(self, record: Record) -> None:
        fields = asdict(record)
        if isinstance(record.value, float) and not math.isfinite(record.value):
            fields["value"] = str(record.value)  # JSON has no NaN
        self._file.write(json.dumps(fields) + "\n")
        self._file.flush()
        print(record.printed(), flush=True)


def read(path: Path) -> list[Record]:
    """The records of a part, also of one that was killed while it wrote."""
    found = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            found.append(Record(**json.loads(line)))
        except ValueError:  # the line was not finished
            break
    return found
