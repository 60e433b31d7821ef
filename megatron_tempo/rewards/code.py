"""Python programs: the last fenced block of a response is run against the tests that are the question's answer."""

from __future__ import annotations

import hashlib
import logging
import re
import threading
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Sequence

from megatron_tempo.config.schema import CodeConfig
from megatron_tempo.rewards.code_pool import CodePool
from megatron_tempo.rewards.code_run import Verdict, first_working
from megatron_tempo.rewards.code_tests import read_tests
from megatron_tempo.rewards.reading import numbered
from megatron_tempo.rewards.scorer import Item

CACHED = 100_000  # verdicts that are kept
COUNTED = {"timeout": "timeouts", "error": "errors", "output": "errors"}
NAMES = ("programs", "none", "cached", "timeouts", "errors")

# Possessive, so that its time is linear.
_FENCE = re.compile(r"[ \t]*+(?:(?:[-*+]|\d{1,3}[.)])[ \t]++)?(`{3,}+|~{3,}+)[ \t]*+([^\s`]*+)[^`]*+")
_PYTHON = re.compile(r"\{?\.?(?:python|py)(?:[23](?:\.\d+)?)?\}?", re.IGNORECASE)

log = logging.getLogger(__name__)


class CodeScorer:
    """Runs programs in a pool of sandboxes. Threads may share it.

    The sandbox is chosen at the first question, so before anything is generated. A program that was judged by the same
    tests before is not run again.
    """

    def __init__(self, config: CodeConfig) -> None:
        self._config = config
        self._lock = threading.Lock()
        self._pool: CodePool | None = None
        self._verdicts: OrderedDict[bytes, Verdict] = OrderedDict()
        self._counts: Counter[str] = Counter()

    def check(self, prompt: str, answer: str) -> None:
        """Raises InputError if the answer holds no tests, or if no sandbox works here."""
        read_tests(answer)
        self.start()

    def score(self, items: Sequence[Item]) -> list[float]:
        """1.0 if a program passes all tests. Raises EngineError if sandboxes do not start."""
        programs = [program_of(item.response) for item in items]
        pairs = list(zip(items, programs, strict=True))
        keys = [None if program is None else _key(item.answer, program) for item, program in pairs]
        asked: dict[str, dict[bytes, str]] = defaultdict(dict)  # programs that are new, by answer
        known: dict[bytes, Verdict] = {}
        with self._lock:
            for (item, program), key in zip(pairs, keys, strict=True):
                if program is None or key is None:
                    continue
                verdict = self._verdicts.get(key)
                if verdict is not None:
                    known[key] = verdict
                else:
                    asked[item.answer][key] = program
        for answer, new in asked.items():
            fresh = dict(zip(new, self.start().run(answer, list(new.values())), strict=True))
            known |= fresh
            self._keep(fresh)
        found = [None if key is None else known[key] for key in keys]
        self._count(found, len(items) - sum(map(len, asked.values())))
        return [float(verdict is not None and verdict.outcome == "right") for verdict in found]

    def classes(self, prompt: str, responses: Sequence[str]) -> list[int | None]:
        """Equal are programs of the same text: without tests, no more is known."""
        return numbered(program_of(response) for response in responses)

    def take_counts(self) -> dict[str, int]:
        """Counts since the last call, by name (docs/code.md); empty if there was nothing to judge."""
        with self._lock:
            counts, self._counts = self._counts, Counter()
        return {f"code/{name}": counts[name] for name in NAMES} if counts else {}

    def close(self) -> None:
        if self._pool is not None:
            self._pool.close()

    def start(self) -> CodePool:
        """The pool. Chooses the sandbox at the first call. Raises InputError if none works here."""
        with self._lock:
            if self._pool is None:
                sandbox, why = first_working(self._config.sandbox, self._config.python)
                for line in why:
                    log.warning("programs do not run in %s", line)
                log.info(
                    "programs run in the sandbox %s, which does not protect from: %s",
                    sandbox.name,
                    "; ".join(sandbox.gaps),
                )
                self._pool = CodePool(self._config, sandbox)
            return self._pool

    def _keep(self, verdicts: dict[bytes, Verdict]) -> None:
        with self._lock:
            self._verdicts.update(verdicts)
            while len(self._verdicts) > CACHED:
                self._verdicts.popitem(last=False)

    def _count(self, found: Sequence[Verdict | None], saved: int) -> None:
        none = sum(verdict is None for verdict in found)
        with self._lock:
            self._counts.update({"programs": len(found) - none, "none": none, "cached": saved - none})
            self._counts.update(COUNTED[one.outcome] for one in found if one is not None and one.outcome in COUNTED)


def program_of(response: str) -> str | None:
    """The last fenced block that is marked as Python; without one, the last block without a mark; else None.

    A block that does not end is none. Blocks may be indented, as in lists. Linear in the length of the response.

    >>> program_of("So:\\n```python\\nprint(1)\\n```")
    'print(1)'
    """
    marked = unmarked = None
    begun: tuple[str, str, int] | None = None
    block: list[str] = []
    for line in response.split("\n"):
        fence = _FENCE.fullmatch(line.rstrip())
        if begun is None:
            if fence is not None:
                begun, block = (fence[1], fence[2], fence.start(1)), []
        elif fence is not None and not fence[2] and fence[1].startswith(begun[0]):
            if _PYTHON.fullmatch(begun[1]):
                marked = block
            elif not begun[1]:
                unmarked = block
            begun = None
        else:
            block.append(line[begun[2] :] if not line[: begun[2]].strip() else line)
    found = unmarked if marked is None else marked
    return None if found is None or not "".join(found).strip() else "\n".join(found)


def _key(answer: str, program: str) -> bytes:
    return hashlib.sha256(b"\0".join(text.encode("utf-8", "surrogatepass") for text in (answer, program))).digest()
