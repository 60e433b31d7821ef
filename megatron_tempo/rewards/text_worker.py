"""The process that decodes long responses: `python -m megatron_tempo.rewards.text_worker`.

Decoding holds Python's lock, so that in the trainer's process it would delay the launches of kernels. This process gets
the tokens and returns what a verifier sees of the texts, or the result of a verifier that is quick. It loads no torch.

Messages on standard input and output are a length, 8 bytes, and as many bytes. The first request is the pickled
tokenizer; the reply is {}. Every other one is a line of JSON, {"view", "quick", "read_unfinished_thoughts"}, and a
packed `Responses`. The reply is JSON: {"texts"}, or of a quick verifier {"result"}: verdicts, or classes if the
responses are compared with one another; or {"error"} if the verifier cannot use its question.
"""

from __future__ import annotations

import json
import os
import pickle
import resource
import sys
from typing import Any, BinaryIO

from megatron_tempo.rewards.quick import quick_verifiers
from megatron_tempo.rewards.responses import Decodes, Responses, View, seen
from megatron_tempo.rewards.scorer import Item

LENGTH_BYTES = 8


def receive(stream: BinaryIO) -> bytes | None:
    """The next message; None if the stream has ended, perhaps in its middle."""
    head = stream.read(LENGTH_BYTES)
    length = int.from_bytes(head, "little")
    message = stream.read(length) if len(head) == LENGTH_BYTES else b""
    return message if len(head) == LENGTH_BYTES and len(message) == length else None


def framed(message: bytes) -> bytes:
    return len(message).to_bytes(LENGTH_BYTES, "little") + message


def reply_to(request: bytes, tokenizer: Decodes) -> dict[str, Any]:
    head, _, packed = request.partition(b"\n")
    order, responses = json.loads(head), Responses.unpack(packed)
    view, unfinished = View[order["view"]], order["read_unfinished_thoughts"]
    texts = [seen(text, view, read_unfinished_thoughts=unfinished) for text in responses.texts(tokenizer, view)]
    if not order["quick"]:
        return {"texts": texts}
    verifier = quick_verifiers()[responses.verifier]
    try:
        if responses.answer is None:
            return {"result": verifier.classes(responses.prompt, texts)}
        items = [Item(responses.verifier, responses.prompt, text, responses.answer) for text in texts]
        return {"result": verifier.score(items)}
    except ValueError as error:
        return {"error": str(error)}


def main() -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # libraries that print must not write to the pipe
    first = receive(sys.stdin.buffer)
    if first is None:
        return
    tokenizer: Decodes = pickle.loads(first)  # from the process that started this one
    reply: dict[str, Any] = {}
    while True:
        replies.write(framed(json.dumps(reply).encode()))
        replies.flush()
        request = receive(sys.stdin.buffer)
        if request is None:
            return
        reply = reply_to(request, tokenizer)


if __name__ == "__main__":
    main()
