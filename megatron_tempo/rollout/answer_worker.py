"""The process that sends requests for responses and turns the answers into arrays, for the first rank.

`python -m megatron_tempo.rollout.answer_worker`, with a socket as standard input (`answer_frames.py`). The bytes of an
answer, 45 (SGLang) to 140 (vLLM) a token, never enter the trainer's process: there, receiving and parsing them would
hold Python's lock while the trainer's thread has kernels to launch. It imports neither torch nor the trainer.

It ends when the socket is closed or its parent is gone.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import sys
import time
from functools import partial

import httpx
import msgspec

from megatron_tempo.rollout.answer_formats import ANSWER_FORMATS, FlatAnswers, refusal_in
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
from megatron_tempo.rollout.connections import CONNECT_SECONDS, LIMITS, authorised

# Bytes of answers that are read at a time. Others wait in the servers, whose sockets are full.
ROOM = 64 << 20
_SHOWN = 2000  # bytes of an answer with an error status


class Room:
    """Bounds the bytes that are held at a time. What exceeds the bound alone is admitted when nothing else is."""

    def __init__(self, size: int) -> None:
        self._size, self._used = size, 0
        self._turn = asyncio.Condition()

    async def take(self, amount: int) -> None:
        async with self._turn:
            await self._turn.wait_for(lambda: self._used == 0 or self._used + amount <= self._size)
            self._used += amount

    async def give(self, amount: int) -> None:
        async with self._turn:
            self._used -= amount
            self._turn.notify_all()


class AnswerWorker:
    """Serves the requests of one connection."""

    def __init__(self, connection: socket.socket, settings: WorkerSettings) -> None:
        self._connection = connection
        self._parse, self._routing = ANSWER_FORMATS[settings.format], settings.routing
        self._client = httpx.AsyncClient(
            headers=authorised(settings.key) | {"Content-Type": "application/json"},
            timeout=httpx.Timeout(settings.seconds, connect=CONNECT_SECONDS),
            limits=LIMITS,
            trust_env=False,
        )
        self._room = Room(ROOM)
        self._sending = asyncio.Lock()
        self._tasks: dict[int, asyncio.Task[None]] = {}

    async def serve(self) -> None:
        """Until the connection is closed."""
        await self._reply(AnswerReply(READY, NO_STATUS))
        while (frame := await receive(self._connection, RequestOrder)) is not None:
            order, body = frame
            if order.url:
                task = self._tasks[order.number] = asyncio.create_task(self._answer(order, body))
                task.add_done_callback(partial(self._forget, order.number))
            elif order.number == PING:
                await self._reply(AnswerReply(PING, NO_STATUS))
            elif order.number in self._tasks:
                self._tasks[order.number].cancel()

    def _forget(self, number: int, _: asyncio.Task[None]) -> None:
        self._tasks.pop(number, None)

    async def _answer(self, order: RequestOrder, body: bytearray) -> None:
        """Reply to one order, whatever happens."""
        try:
            async with self._client.stream("POST", order.url, content=bytes(body)) as response:
                if response.status_code == 200:
                    await self._parsed(order, response)
                else:
                    await self._reply(AnswerReply(order.number, response.status_code, await _beginning(response)))
            return
        except httpx.HTTPError as error:
            words = f"did not answer: {type(error).__name__} {error}".rstrip()
        except Exception as error:  # noqa: BLE001 - no request may stay without a reply
            words = f"gave an answer that cannot be read: {error!r}"
        with contextlib.suppress(OSError):  # the trainer is gone, which `serve` sees too
            await self._failed(order.number, words)

    async def _parsed(self, order: RequestOrder, response: httpx.Response) -> None:
        """Read, parse and pass on an answer, within the room for answers."""
        received, number = time.monotonic(), order.number
        given = response.headers.get("content-length", "")
        amount = int(given) if given.isdecimal() else ROOM
        await self._room.take(amount)
        try:
            content = bytearray()
            async for chunk in response.aiter_bytes():
                content += chunk
            try:
                answers = self._parse(content, self._routing if order.with_experts else None)
            except (ValueError, RecursionError, msgspec.MsgspecError) as error:
                await self._failed(number, _words(content, response.url.path, error))
                return
            del content
            await self._reply(AnswerReply(number, 200, received=received, rows=answers.rows), answers)
        finally:
            await self._room.give(amount)

    async def _failed(self, number: int, words: str) -> None:
        await self._reply(AnswerReply(number, NO_STATUS, words))

    async def _reply(self, reply: AnswerReply, answers: FlatAnswers | None = None) -> None:
        pieces = packed(reply) if answers is None else packed(reply, answers.tokens, answers.logprobs, *answers.experts)
        # A request may be abandoned while its frame is sent, and half a frame would spoil all that follow.
        await asyncio.shield(asyncio.create_task(self._send(pieces)))

    async def _send(self, pieces: list[Piece]) -> None:
        async with self._sending:
            await send(self._connection, pieces)


async def _beginning(response: httpx.Response) -> str:
    content = bytearray()
    async for chunk in response.aiter_bytes():
        content += chunk
        if len(content) > _SHOWN:
            break
    return content[:_SHOWN].decode(errors="replace")[:500]


def _words(content: bytearray, path: str, error: Exception) -> str:
    if (message := refusal_in(content)) is not None:
        return f"refused {path}: {message}"
    return f"gave a response that makes no sense: {error}"


async def main() -> None:
    connection = socket.socket(fileno=os.dup(0))
    connection.setblocking(False)
    frame = await receive(connection, WorkerSettings)
    if frame is None:
        return
    settings = frame[0]
    # The connection may outlive the parent in a process that the parent has forked.
    parent = os.pidfd_open(settings.parent)
    if os.getppid() != settings.parent:
        return
    asyncio.get_running_loop().add_reader(parent, lambda: os._exit(0))
    await AnswerWorker(connection, settings).serve()


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM):  # for the trainer, which ends its iteration first
        signal.signal(number, signal.SIG_IGN)
    try:
        asyncio.run(main())
    except OSError:  # the trainer is gone
        sys.exit(1)
