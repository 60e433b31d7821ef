"""The trainer's side of `answer_worker`: requests go to it, arrays come back. It is restarted when it dies."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import megatron_tempo
from megatron_tempo.config.routing import RoutingFormat
from megatron_tempo.errors import EngineError
from megatron_tempo.rollout.answer_experts import RoutingForm
from megatron_tempo.rollout.answer_formats import AnswerRow, is_unavailable
from megatron_tempo.rollout.answer_frames import (
    NO_STATUS,
    PING,
    READY,
    AnswerReply,
    Piece,
    RequestOrder,
    WorkerSettings,
    packed,
    receive,
    send,
)

log = logging.getLogger(__name__)

DEATHS = 3  # in a row, without an answer between them, before requests fail
START_SECONDS = 120.0  # for Python and httpx to load, on a busy machine
END_SECONDS = 2.0  # for the worker to end by itself
PING_SECONDS = 30.0  # between checks that it responds
HANG_SECONDS = 120.0  # for it to respond
_SIGNALS = {one.value: one.name for one in signal.Signals}


class CannotAnswer(EngineError):
    """A request that no server would answer, or whose answer nobody would read."""


class AskAgain(EngineError):
    """A request that a server does not take now, and may take later. The server is in order."""


@dataclass(frozen=True, slots=True)
class RawAnswers:
    """The responses to one request, unchecked. The arrays can be written."""

    rows: list[AnswerRow]
    tokens: NDArray[np.int32]  # of all rows
    logprobs: NDArray[np.float32]
    received: float  # when the answer began to arrive, by `time.monotonic`
    experts: NDArray[np.uint8] = field(default_factory=lambda: np.empty(0, np.uint8))  # their bytes, of all rows


def nothing_yet(samples: int) -> RawAnswers:
    """The answer to a request that is interrupted before its first token."""
    rows = [AnswerRow(0, 0, "abort", []) for _ in range(samples)]
    return RawAnswers(rows, np.empty(0, np.int32), np.empty(0, np.float32), time.monotonic())


@dataclass(frozen=True, slots=True, eq=False)
class _Pending:
    path: str
    frame: list[Piece]
    reply: asyncio.Future[RawAnswers]


class AnswerReader:
    """One `answer_worker` process. All methods run in one event loop."""

    def __init__(self, format_name: str, key: str, seconds: float, routing: RoutingFormat | None = None) -> None:
        """`seconds`: time limit for an answer. `routing`: of the experts that servers return; None: of none."""
        form = None
        if routing is not None:
            form = RoutingForm(routing.layers, routing.per_token, routing.experts, routing.itemsize)
        self._settings = WorkerSettings(os.getpid(), format_name, key, seconds, form)
        self._pending: dict[int, _Pending] = {}
        self._orders: asyncio.Queue[list[Piece]] = asyncio.Queue()
        self._number = 0
        self._deaths = 0
        self._broken: str | None = None
        self._running: asyncio.Task[None] | None = None
        self._heard = asyncio.Event()
        self.process: subprocess.Popen[bytes] | None = None

    async def open(self) -> None:
        """Start the worker and wait until it is ready. Raises EngineError."""
        ready = asyncio.get_running_loop().create_future()
        self._pending[READY] = _Pending("", [], ready)
        self._running = asyncio.create_task(self._run())
        try:
            await asyncio.wait_for(ready, START_SECONDS)
        except TimeoutError as error:
            raise EngineError(
                f"the process that reads the servers' answers is not ready after {START_SECONDS:g} s"
            ) from error

    async def ask(self, url: str, path: str, body: dict[str, Any], *, with_experts: bool = False) -> RawAnswers:
        """The answer to a POST of a JSON body to a path of a server. If this is cancelled, so is the request.

        `with_experts`: whether the experts in it are read.
        Raises EngineError if the server does not answer well, AskAgain if it takes no requests now, CannotAnswer if no
        server would answer, or if the worker dies again and again.
        """
        if self._broken is not None:
            raise CannotAnswer(self._broken)
        self._number += 1
        number = self._number
        content = json.dumps(body, separators=(",", ":")).encode()
        frame = packed(RequestOrder(number, url.rstrip("/") + path, with_experts), content)
        pending = self._pending[number] = _Pending(path, frame, asyncio.get_running_loop().create_future())
        self._orders.put_nowait(frame)
        try:
            return await pending.reply
        finally:
            if self._pending.pop(number, None) is not None:  # cancelled
                self._orders.put_nowait(packed(RequestOrder(number)))

    async def close(self) -> None:
        """End the worker. Requests without an answer stay without one."""
        if self._running is not None:
            self._running.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._running

    async def _run(self) -> None:
        """Keep a worker until it has died too often."""
        try:
            while self._broken is None:
                ours, theirs = socket.socketpair()
                ours.setblocking(False)
                with ours:
                    with theirs:
                        process = self.process = _start(theirs)
                    try:
                        await self._talk(ours, process)
                    finally:
                        ours.close()
                        code = await _ended(process)
                self._died(code)
        except Exception as error:  # noqa: BLE001 - otherwise requests would wait for ever
            self._give_up(f"the process that reads the servers' answers cannot be kept: {error!r}")

    async def _talk(self, connection: socket.socket, process: subprocess.Popen[bytes]) -> None:
        """Until the worker is gone."""
        self._orders = asyncio.Queue()
        for frame in (packed(self._settings), *(one.frame for one in self._pending.values() if one.frame)):
            self._orders.put_nowait(frame)
        helpers = [asyncio.create_task(self._write(connection)), asyncio.create_task(self._watch(process))]
        try:
            with contextlib.suppress(OSError):
                while (reply := await receive(connection, AnswerReply)) is not None:
                    self._take(*reply)
        finally:
            for helper in helpers:
                helper.cancel()

    async def _write(self, connection: socket.socket) -> None:
        with contextlib.suppress(OSError):  # `_talk` sees that the worker is gone
            while True:
                await send(connection, await self._orders.get())

    async def _watch(self, process: subprocess.Popen[bytes]) -> None:
        """Kill a worker that does not respond."""
        while True:
            await asyncio.sleep(PING_SECONDS)
            self._heard.clear()
            self._orders.put_nowait(packed(RequestOrder(PING)))
            limit = HANG_SECONDS
            try:
                await asyncio.wait_for(self._heard.wait(), limit)
            except TimeoutError:
                log.warning("the process that reads the servers' answers has not responded for %g s", limit)
                process.kill()

    def _take(self, reply: AnswerReply, raw: bytearray) -> None:
        self._heard.set()
        pending = self._pending.pop(reply.number, None)
        if pending is None or pending.reply.done():  # cancelled meanwhile
            return
        if reply.number != READY:
            self._deaths = 0
        if reply.status == 200 or reply.number == READY:
            pending.reply.set_result(_arrays(reply, raw))
        elif reply.status == NO_STATUS:
            pending.reply.set_exception(EngineError(reply.words))
        else:
            pending.reply.set_exception(refusal(reply.status, pending.path, reply.words))

    def _died(self, code: int) -> None:
        self._deaths += 1
        how = f"was killed by {_SIGNALS.get(-code, -code)}" if code < 0 else f"ended with exit code {code}"
        if self._deaths < DEATHS:
            unfinished = sum(number != READY for number in self._pending)
            again = f"; its {unfinished} unfinished requests are asked again" if unfinished else ""
            log.warning("the process that reads the servers' answers %s%s", how, again)
            return
        self._give_up(
            f"the process that reads the servers' answers died {self._deaths} times in a row and {how}: if not by lack "
            "of memory, its error is on stderr"
        )

    def _give_up(self, why: str) -> None:
        """All requests fail, and those to come."""
        self._broken = why
        pending, self._pending = self._pending, {}
        for one in pending.values():
            if not one.reply.done():
                one.reply.set_exception(CannotAnswer(why))


def refusal(status: int, path: str, text: str) -> EngineError:
    """The error for an answer with a status other than 200."""
    kind = CannotAnswer if status in (400, 413, 422) else EngineError
    if status == 503 and is_unavailable(text):
        kind = AskAgain
    return kind(f"answered {path} with {status}: {text[:500]}")


def _arrays(reply: AnswerReply, raw: bytearray) -> RawAnswers:
    first = 4 * sum(row.tokens for row in reply.rows)
    second = first + 4 * sum(row.logprobs for row in reply.rows)
    view = memoryview(raw)
    tokens, logprobs = np.frombuffer(view[:first], np.int32), np.frombuffer(view[first:second], np.float32)
    return RawAnswers(reply.rows, tokens, logprobs, reply.received, np.frombuffer(view[second:], np.uint8))


def _start(connection: socket.socket) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "megatron_tempo.rollout.answer_worker"],
        stdin=connection.fileno(),
        stdout=subprocess.DEVNULL,
        cwd=Path(megatron_tempo.__file__).parents[1],  # so that `-m` finds this package
        start_new_session=True,  # Ctrl-C is for the trainer; when it ends, the connection is closed
    )


async def _ended(process: subprocess.Popen[bytes]) -> int:
    """The exit code of a worker whose connection is closed."""
    try:
        for _ in range(round(END_SECONDS / 0.01)):
            if (code := process.poll()) is not None:
                return code
            await asyncio.sleep(0.01)
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
    return process.wait()
