"""What reading servers' answers costs the trainer's process: its own process for it, against a thread of the trainer.

    python tools/bench_answers.py [--engine vllm] [--answers 64] [--samples 8] [--tokens 16384]

A stub server answers every request at once with the same made-up responses, in the form of SGLang or vLLM. A thread
ticks each millisecond, as the trainer's would launch kernels. Prints, for each way: processor time of the trainer and
of the worker, a token; memory that the answers keep, a token; the longest gap between two ticks.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import importlib
import json
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import httpx
import numpy as np
import psutil

from tests.support.answers import BODIES, Said

VOCAB = 150_000
TICK = 0.001  # seconds


def made_up(engine: str, samples: int, tokens: int) -> bytes:
    """The body of an answer. Numbers have as many digits as a float32 that Python writes."""
    draw = random.Random(0)
    responses = []
    for _ in range(samples):
        logprobs = [float(np.float32(-draw.expovariate(3))) for _ in range(tokens)]
        responses.append(Said([draw.randrange(VOCAB) for _ in range(tokens)], logprobs, [("0", 0, tokens)]))
    return json.dumps(BODIES[engine](responses), separators=(",", ":")).encode()


def serve(body: bytes) -> None:
    """Print a port, and answer every request there until killed."""
    begin = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(body)

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):  # the client has closed it
            while head := (await reader.readuntil(b"\r\n\r\n")).lower():
                await reader.readexactly(int(head.partition(b"content-length:")[2].split()[0]))
                writer.write(begin)
                for start in range(0, len(body), 1 << 18):
                    writer.write(body[start : start + (1 << 18)])
                    await writer.drain()
        writer.close()

    async def forever() -> None:
        server = await asyncio.start_server(answer, "127.0.0.1", 0)
        print(server.sockets[0].getsockname()[1], flush=True)
        await server.serve_forever()

    asyncio.run(forever())


def by_json(engine: str, content: bytes) -> list[tuple[tuple[int, ...], tuple[float, ...]]]:
    """The responses as tuples of Python's numbers, as they were before the worker."""
    read = json.loads(content)
    if engine == "sglang":
        pairs = [(one["output_ids"], [e[0] for e in one["meta_info"]["output_token_logprobs"]]) for one in read]
    else:
        pairs = [(one["token_ids"], [e["logprob"] for e in one["logprobs"]["content"]]) for one in read["choices"]]
    assert all(0 <= token < VOCAB for tokens, _ in pairs for token in tokens)
    return [(tuple(tokens), tuple(min(p, 0.0) for p in logprobs)) for tokens, logprobs in pairs]


async def in_a_thread(url: str, args: argparse.Namespace, kept: list[Any]) -> float:
    async with httpx.AsyncClient(timeout=600, trust_env=False) as client:

        async def one() -> None:
            kept.append(by_json(args.engine, (await client.post(url, json={})).content))

        await asyncio.gather(*(one() for _ in range(args.answers)))
    return 0.0


async def in_a_process(url: str, args: argparse.Namespace, kept: list[Any]) -> float:
    """Returns the worker's seconds of processor time."""
    from megatron_tempo.rollout.answer_checks import checked_completions
    from megatron_tempo.rollout.answer_reader import AnswerReader
    from megatron_tempo.rollout.engine import Request, Sampling
    from megatron_tempo.rollout.replica import Ask, GenerationJob

    reader = AnswerReader(args.engine, "key", 600.0)
    await reader.open()
    assert reader.process is not None
    before = psutil.Process(reader.process.pid).cpu_times()
    ask = Ask(GenerationJob(), 0, Request((1,), args.samples, 0), Sampling(1.0, args.tokens), oldest=0)

    async def one() -> None:
        kept.append(checked_completions(await reader.ask(url, "/generate", {}), ask, VOCAB, 0))

    await asyncio.gather(*(one() for _ in range(args.answers)))
    after = psutil.Process(reader.process.pid).cpu_times()
    await reader.close()
    return float(after.user + after.system - before.user - before.system)


def measured(work: Callable[[str, argparse.Namespace, list[Any]], Coroutine[Any, Any, float]], url: str,
             args: argparse.Namespace) -> dict[str, float]:  # fmt: skip
    """Seconds and bytes a token, and the longest gap between ticks, while a thread does the work."""
    kept: list[Any] = []
    worker: list[float] = []
    thread = threading.Thread(target=lambda: worker.append(asyncio.run(work(url, args, kept))))
    resident, processor = psutil.Process().memory_info().rss, time.process_time()
    thread.start()
    longest, last = 0.0, time.perf_counter()
    while thread.is_alive():
        time.sleep(TICK)
        longest, last = max(longest, time.perf_counter() - last), time.perf_counter()
    total = args.answers * args.samples * args.tokens
    return {
        "trainer_ns_a_token": (time.process_time() - processor) / total * 1e9,
        "worker_ns_a_token": worker[0] / total * 1e9,
        "bytes_a_token": (psutil.Process().memory_info().rss - resident) / total,
        "longest_gap_ms": longest * 1e3,
    }


def main(words: list[str] | None = None) -> dict[str, dict[str, float]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", choices=sorted(BODIES), default="vllm")
    for name, default in (("answers", 64), ("samples", 8), ("tokens", 16384)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--in-a-thread", type=int, default=8, help="answers to read that way, which is slow")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(words)
    if args.serve:
        serve(made_up(args.engine, args.samples, args.tokens))
    importlib.import_module("megatron_tempo.rollout.answer_checks")  # with torch: no part of what is measured
    shape = [f"--engine={args.engine}", f"--samples={args.samples}", f"--tokens={args.tokens}"]
    with subprocess.Popen([sys.executable, __file__, "--serve", *shape], stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        try:
            url = f"http://127.0.0.1:{int(server.stdout.readline())}"
            results = {"in a process": measured(in_a_process, url, args)}
            args.answers = args.in_a_thread
            results["in a thread"] = measured(in_a_thread, url, args)
        finally:
            server.kill()
    for way, numbers in results.items():
        print(f"{args.engine} {way}: {'  '.join(f'{name} {number:.1f}' for name, number in numbers.items())}")
    return results


if __name__ == "__main__":
    main()
