"""Damage to good inputs: JSON values, bytes, and what lies in a file's place. Every draw comes from one generator."""

from __future__ import annotations

import copy
import json
import os
import random
import shutil
import stat
from pathlib import Path
from typing import Any

HUGE = int("9" * 309)  # larger than any float
NUMBERS: tuple[float, ...] = (
    *(0, -1, 1, 2, 7, 1000, 2**31, 2**63, -(2**63), 2**64, 1_000_000_007, 10**308, HUGE, -HUGE),
    *(0.5, -0.5, 1e-320, 1e18, 1e308, -1e308, float("nan"), float("inf"), float("-inf")),
)
TEXTS = (
    *("", " ", "x", "null", "true", "1e5", ".nan", "12:00:00", "0x10", "-", "--help", "..", "/", "~", "a/b", "a.b"),
    *("x" * 256, "x" * 5000, "/".join(["x" * 200] * 30), "9" * 309, "9" * 5000),
    *("\x1b[31mred", "\x9b2J", "\x7f", "a\nb", "a\rb", "\t", "\u2028", "\u202egnp.exe", "\u2066a", "\u200b", "\ufeffa"),
    *("\udcff", "\ud83d", "数学", "e\u0301", "\U0001f642", "ﬁ", "İ", "\U000e0041"),
    *("${run.dir}", "${x", "${oc.env:HOME}", "{", "[", "[1", "{a: 1}", "'", '"', "%s", "{0}", "a=b", "$(true)", "`x`"),
    *("!!python/object:os.system", "import:nothing.there:x", "import:", "/dev/null", "&a [*a]", "<b>", "*", "\\"),
)
SHAPES = ("3", "null", "true", "[]", "{}", '"x"', "[[]]", '[{"a": 1}]', "NaN", "-", "{", '{"a": 1', "9" * 5000, "")


class Mutator:
    """Draws damage from `rng`. Notes in `done` what it did, in `fields` the parts of JSON values that it damaged."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.done: list[str] = []
        self.fields: list[str] = []

    def text(self) -> str:
        return self.rng.choice(TEXTS)

    def number(self) -> float:
        return self.rng.choice(NUMBERS)

    def value(self, depth: int = 0) -> Any:
        """Any JSON value."""
        kind = self.rng.randrange(8 if depth < 2 else 4)
        if kind < 4:
            return [self.number(), self.text(), None, self.rng.random() < 0.5][kind]
        many = self.rng.choice((0, 1, 3))
        if kind < 6:
            return [self.value(depth + 1) for _ in range(many)]
        return {self.text(): self.value(depth + 1) for _ in range(many)}

    def json(self, value: Any) -> Any:
        """The value with one part of it damaged."""
        value = copy.deepcopy(value)
        places = list(_places(value))
        if not places:
            return self.value()
        parent, key, path = self.rng.choice(places)
        old = parent[key]
        how = self.rng.choice(("drop", "retype", "number", "text", "double", "rename", "nest"))
        if how == "drop":
            del parent[key]
        elif how == "rename" and isinstance(parent, dict):
            parent[self.text()] = parent.pop(key)
        elif how == "double" and isinstance(old, list | dict | str):
            parent[key] = [*old, *old] if isinstance(old, list) else {"again": old, key: old}
        elif how == "nest":
            parent[key] = self.rng.choice(([old], {"x": old}, [[[old]]]))
        else:
            parent[key] = {"number": self.number, "text": self.text}.get(how, self.value)()
        now = repr(parent.get(key)) if isinstance(parent, dict) else repr(parent)
        self.done.append(f"{how} {path}: now {now:.80}")
        self.fields.append(path)
        return value

    def bytes(self, data: bytes) -> bytes:
        """The bytes of a file, damaged."""
        rng, at = self.rng, self.rng.randrange(len(data) + 1)
        end = min(len(data), at + rng.choice((1, 8, 100)))
        odd = rng.choice((b"\0", b"\xff\xfe", b"\xed\xa0\x80", b"\xef\xbb\xbf", b"\x1b[2J", b"\r", b"\n\n", b",", b'"'))
        name, changed = rng.choice(
            (
                ("cut", data[:at]),
                ("insert", data[:at] + odd + data[at:]),
                ("remove", data[:at] + data[end:]),
                ("double", data + data),
                ("repeat", data[:end] + data[at:]),
                ("other numbers", data.replace(b"1", str(self.number()).encode())),
                ("shape", rng.choice(SHAPES).encode()),
                ("nested", b"[" * 200_000),
                ("nested objects", b'{"a":' * 100_000),
                ("UTF-16", data.decode("utf-8", "replace").encode("utf-16")),
                ("zeros", bytes(len(data))),
                ("noise", rng.randbytes(rng.choice((1, 64, 5000)))),
                ("flip", data[:at] + bytes(byte ^ 1 << rng.randrange(8) for byte in data[at:end]) + data[end:]),
            )
        )
        self.done.append(f"bytes: {name} at {at}")
        return changed

    def place(self, path: Path) -> None:
        """Put something else in the place of a file or folder."""
        how = self.rng.choice(("gone", "folder", "pipe", "loop", "dangling", "unreadable", "device", "long link"))
        self.done.append(f"{path.name}: {how}")
        if how == "unreadable":
            path.chmod(0)
            return
        if stat.S_ISDIR(path.lstat().st_mode):
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
        if how == "folder":
            path.mkdir()
        elif how == "pipe":
            os.mkfifo(path)
        elif how != "gone":
            path.symlink_to({"loop": path.name, "device": "/dev/zero", "long link": "x" * 300}.get(how, "not/there"))

    def file(self, path: Path) -> None:
        """Damage a file in any way: its JSON, one of its lines, its bytes, or its place."""
        how = self.rng.randrange(8)
        if how == 0:
            self.place(path)
        elif how < 3 or path.suffix not in (".json", ".jsonl"):
            path.write_bytes(self.bytes(path.read_bytes()))
        else:
            try:
                self._json_file(path)
            except (ValueError, RecursionError, OSError):  # damaged already, and no JSON any more
                path.write_bytes(self.bytes(path.read_bytes()))
        self.done[-1] = f"{path.name}: {self.done[-1]}"

    def _json_file(self, path: Path) -> None:
        lines = path.read_text(encoding="utf-8").splitlines() if path.suffix == ".jsonl" else [path.read_text("utf-8")]
        at = self.rng.randrange(len(lines))
        lines[at] = json.dumps(self.json(json.loads(lines[at])))
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _places(value: Any, path: str = "") -> list[tuple[Any, Any, str]]:
    """Every part of a JSON value: what it is in, its key or index there, and its path."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    places = []
    for key, item in items:
        here = f"{path}.{key}" if path else str(key)
        places += [(value, key, here), *_places(item, here)]
    return places
