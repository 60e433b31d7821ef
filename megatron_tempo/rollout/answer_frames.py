"""What the first rank and `answer_worker.py` send each other through a socket: frames of a message and raw bytes.

A frame is the sizes of both parts, the message in MessagePack, and the raw bytes: the body of a request, or the tokens
(int32), log-probabilities (float32) and experts (uint8 or int16) of an answer. No number of a token is ever converted.
"""

from __future__ import annotations

import asyncio
import socket
import struct
from array import array
from collections.abc import Sequence
from typing import TypeVar

import msgspec
from msgspec import Struct

from megatron_tempo.rollout.answer_experts import RoutingForm
from megatron_tempo.rollout.answer_formats import AnswerRow

Piece = bytes | memoryview

_SIZES = struct.Struct("<IQ")
_T = TypeVar("_T")


class WorkerSettings(Struct, array_like=True):
    """The first frame that a worker gets. It replies with an `AnswerReply` of number `READY`."""

    parent: int  # its process id
    format: str  # `answer_formats.ANSWER_FORMATS`
    key: str
    seconds: float  # time limit for an answer
    routing: RoutingForm | None = None  # of the experts that the servers return


class RequestOrder(Struct, array_like=True):
    """Send the raw bytes to `url`, as JSON. Without a `url`: abandon the request of this number, or reply to `PING`.

    `with_experts`: read the experts in the answer.
    """

    number: int
    url: str = ""
    with_experts: bool = False


class AnswerReply(Struct, array_like=True):
    """The outcome of a request.

    Status 200: `rows` describe the raw bytes. Another status of HTTP: `words` is the beginning of the answer.
    `NO_STATUS`: `words` says what failed.
    """

    number: int
    status: int
    words: str = ""
    received: float = 0.0  # when the answer began to arrive, by `time.monotonic`, which a machine's processes share
    rows: list[AnswerRow] = []


READY = -1
PING = -2
NO_STATUS = 0


def packed(message: Struct, *raw: bytes | array[int] | array[float]) -> list[Piece]:
    """A frame, in pieces to be sent one after the other."""
    head = msgspec.msgpack.encode(message)
    views = [memoryview(part).cast("B") for part in raw]
    return [_SIZES.pack(len(head), sum(map(len, views))) + head, *views]


async def send(connection: socket.socket, pieces: Sequence[Piece]) -> None:
    """Send a frame. Only one task may send through a connection at a time."""
    for piece in pieces:
        await asyncio.get_running_loop().sock_sendall(connection, piece)


async def receive(connection: socket.socket, kind: type[_T]) -> tuple[_T, bytearray] | None:
    """The next frame; None if the other side has closed the connection. Raises OSError if it died in a frame."""
    sizes = bytearray(_SIZES.size)
    if not await _fill(connection, sizes):
        return None
    of_head, of_raw = _SIZES.unpack(sizes)
    head, raw = bytearray(of_head), bytearray(of_raw)
    if not (await _fill(connection, head) and await _fill(connection, raw)):
        raise ConnectionResetError("the connection ended within a frame")
    return msgspec.msgpack.decode(head, type=kind), raw


async def _fill(connection: socket.socket, buffer: bytearray) -> bool:
    """Fill the buffer. False if the connection ended before."""
    loop, rest = asyncio.get_running_loop(), memoryview(buffer)
    while rest:
        count = await loop.sock_recv_into(connection, rest)
        if count == 0:
            return False
        rest = rest[count:]
    return True
