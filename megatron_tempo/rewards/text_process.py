"""The trainer's side of a `text_worker` process."""

from __future__ import annotations

import json
import logging
import pickle
import subprocess
import threading
from typing import Any

from megatron_tempo.rewards.responses import Decodes, Responses, View
from megatron_tempo.rewards.text_worker import framed, receive
from megatron_tempo.rewards.worker_process import end, start
from megatron_tempo.runtime import progress_marker

STARTS = 3  # that may fail before responses are decoded in the trainer's process for the rest of the run

log = logging.getLogger(__name__)


class TextProcess:
    """Starts on first use. A process that ends is replaced. Threads may share it; it serves one at a time."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._tokenizer: Decodes | None = None  # the one that the process has
        self._lock = threading.Lock()
        self._failures = 0

    def ask(
        self, responses: Responses, tokenizer: Decodes, view: View, *, quick: bool, read_unfinished_thoughts: bool
    ) -> dict[str, Any] | None:
        """The reply of `text_worker`; None if the process cannot start, or ends."""
        order = {"view": view.name, "quick": quick, "read_unfinished_thoughts": read_unfinished_thoughts}
        with self._lock:
            if self._failures == STARTS:
                return None
            reply = self._exchange(json.dumps(order).encode() + b"\n" + responses.pack(), tokenizer)
            if reply is None:
                self._failed()
            else:
                self._failures = 0
        progress_marker.mark()
        return reply

    def close(self) -> None:
        process, self._process, self._tokenizer = self._process, None, None
        if process is not None:
            end(process)

    def _exchange(self, request: bytes, tokenizer: Decodes) -> dict[str, Any] | None:
        if self._tokenizer is not tokenizer or self._process is None or self._process.poll() is not None:
            self.close()
            try:
                pickled = pickle.dumps(tokenizer)
            except (pickle.PicklingError, AttributeError, TypeError) as error:
                log.info("the tokenizer cannot be sent to another process (%s)", error)
                return None
            environment = {"TOKENIZERS_PARALLELISM": "false"}
            self._process = start("megatron_tempo.rewards.text_worker", environment=environment)
            self._tokenizer = tokenizer
            if self._message(pickled) is None:
                return None
        return self._message(request)

    def _message(self, message: bytes) -> dict[str, Any] | None:
        assert self._process is not None
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(framed(message))
            self._process.stdin.flush()
        except BrokenPipeError:
            return None
        reply = receive(self._process.stdout)  # type: ignore[arg-type]
        return None if reply is None else json.loads(reply)

    def _failed(self) -> None:
        self.close()
        self._failures += 1
        if self._failures == STARTS:
            log.warning(
                "the process that decodes responses failed %d times in a row; from now on the trainer decodes them "
                "itself, which takes its time",
                STARTS,
            )
