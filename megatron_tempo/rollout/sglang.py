"""SGLang's adapter.

It takes whole tensors only: its vocabulary layers refuse others (0.5.23, `srt/layers/vocab_parallel_embedding.py`,
`weight_loader`), and it receives a bucket as one broadcast. So our plugin, `sglang_parts.py`, runs in its processes and
takes tensors in parts. A server that was started without it gets whole tensors: its largest bucket is its largest one.

SGLang reports success for an update that misses a tensor or names one wrongly. Its checksums (`/weights_checker`) are
of the parameters that it computes with, one of each on each tensor rank (`sglang_checksums.py`, and
`sglang_experts.py` for a mixture's experts). Its other endpoint that reads parameters, `/get_weights_by_name`, does not
know our families.

Its log-probabilities are those before top-k, top-p and min-p (`srt/layers/sampler.py`), and top-p's shares are of all
tokens, so with top-k other tokens are left than elsewhere. So our own logit processor truncates
(`sglang_truncation.py`), before SGLang samples without options: its log-probabilities are then those of the truncated
distribution.
"""

from __future__ import annotations

import base64
import io
import json
import math
import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing

from megatron_tempo.config.routing import RoutingFormat
from megatron_tempo.files import read_json
from megatron_tempo.rollout.answer_checks import differing
from megatron_tempo.rollout.cuda_memory import Pickler
from megatron_tempo.rollout.end_tokens import other_ends_of_sglang
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
from megatron_tempo.rollout.sglang_checksums import (
    EMBEDDING,
    FUSED,
    HEAD,
    bytes_hash,
    gpu_hash,
    installed,
    of_rank,
)
from megatron_tempo.rollout.sglang_experts import EXPERTS, ExpertSums, expert_sums, is_piece
from megatron_tempo.rollout.slices import Places, Slices
from megatron_tempo.rollout.whole_tensors import WholeParameters
from megatron_tempo.types import Bucket, PartName

# The plugin, its entry point, and the function that loads a bucket from shared memory.
PLUGIN = Path(__file__).with_name("sglang_parts.py")
_PLUGIN_NAME, _LOADER = "megatron_tempo_parts", f"{PLUGIN.stem}.load"
_ON_CPU = [
    "--device=cpu",
    "--attention-backend=torch_native",
    "--sampling-backend=pytorch",
    "--grammar-backend=none",
    "--disable-cuda-graph",
]
# Given explicitly: a missing entry may be taken from the model's generation_config.json.
_NOTHING_ELSE = {
    "top_p": 1.0,
    "top_k": -1,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "frequency_penalty": 0.0,
    "presence_penalty": 0.0,
}
_HERE = Path(__file__)
# What SGLang's servers get of ours, and under which names.
_MODULES = {
    _HERE.with_name("sglang_truncation.py"): "megatron_tempo_sglang.py",
    _HERE.parents[1] / "kernels" / "truncation.py": "megatron_tempo_truncation.py",
}
# SGLang unpickles the class of a logit processor. This pickle is only its name.
_PROCESSOR = json.dumps({"callable": b"\x80\x02cmegatron_tempo_sglang\nTruncationProcessor\n.".hex()})


class Sglang:
    """A `ServerAdapter`, for SGLang 0.5.23. `truncates`: requests may have top-p, top-k or min-p.

    SGLang uses a request's seed only if it runs with `--enable-deterministic-inference`, and all samples of a request
    would have the same one. So with seeds each sample is an entry of its own.
    """

    name = "SGLang"
    takes_parts = True
    asks_for_parts: Call | None = Call("/server_info")
    versions = EngineVersions("SGLang", ("sglang",), ("0.5.23",), "0.5.23")
    asks_for_version = Call("/server_info")
    health = Call("/health")
    # Answers once the scheduler has made progress, or has generated a token of a request of its own.
    progress = Call("/health_generate")
    answer_format = "sglang"
    memory_option = "--mem-fraction-static"

    def __init__(
        self,
        *,
        cpu: bool,
        tensor: int,
        sleeps: bool = False,
        truncates: bool = False,
        key_heads: int | None = None,
        routing: RoutingFormat | None = None,
        experts: int | None = None,
    ) -> None:
        """`key_heads`: the model's heads of keys, which the checksums of several workers depend on.

        `experts`: of each layer of a mixture; None: there are none, or their checksums are not compared.
        """
        self.routing = routing
        self._cpu, self._tensor, self._sleeps, self._truncates = cpu, tensor, sleeps, truncates
        self._key_heads = key_heads
        self._experts = experts
        self._expert_sums = None if experts is None or cpu else ExpertSums(experts)
        self._wholes = WholeParameters(FUSED.values())

    def launch(self, start: Start) -> Launch:
        arguments = {
            "model-path": str(served_folder(start.model, start.folder / "model", start.precision, flat_rope=True)),
            "load-format": "dummy",
            "dtype": DTYPES[start.precision],
            "tp-size": start.config.tensor,
            "host": start.host,
            "port": start.port,
            "api-key": start.key,
            "skip-server-warmup": True,
        }
        if self._sleeps and not self._cpu:  # needs torch-memory-saver, which is for GPUs
            arguments["enable-memory-saver"] = True
        # A file, since others can read command lines. JSON is valid YAML.
        private = private_file(start.folder / "arguments.yaml", json.dumps(arguments))
        environment = ON_CPU | {"SGLANG_USE_CPU_ENGINE": "1"} if self._cpu else {}
        environment |= _with_plugin(start.folder / "python")
        cpu = [*_ON_CPU, f"--max-total-tokens={_cache_tokens(start.model)}"] if self._cpu else []
        command = ["-m", "sglang.launch_server", "--config", str(private), f"--custom-weight-loader={_LOADER}"]
        if self._truncates:
            _copy_truncation(start.folder / "python")
            command.append("--enable-custom-logit-processor")
        if self.routing is not None:
            command.append("--enable-return-routed-experts")
        return Launch([*command, *cpu, *start.config.arguments], environment)

    def answers_parts(self, answer: str) -> bool:
        return _LOADER in (json.loads(answer).get("custom_weight_loader") or [])

    def progress_of(self, answer: str) -> None:
        return None

    def generate(self, request: Request, sampling: Sampling, end_tokens: Sequence[int]) -> Call:
        parameters: dict[str, Any] = {
            "n": request.samples,
            "temperature": sampling.temperature,
            "max_new_tokens": sampling.max_tokens,
            "stop_token_ids": list(end_tokens),
            **_NOTHING_ELSE,
        }
        if sampling.stop:
            parameters["stop_regex"] = list(map(_stop_pattern, sampling.stop))
        body: dict[str, Any] = {"return_logprob": True}
        if sampling.with_experts:
            body |= {"return_routed_experts": True, "routed_experts_start_len": request.experts_from}
        if (truncation := sampling.truncation) is not None:
            # Numbers only; a top_k of 0 is none.
            own = {"top_p": truncation.top_p, "top_k": truncation.top_k or 0, "min_p": truncation.min_p}
            parameters["custom_params"] = {"temperature": sampling.temperature, **own}
            body["custom_logit_processor"] = _PROCESSOR
        prompt = list(request.token_ids)
        if not sampling.seeded:
            return Call("/generate", {"input_ids": [prompt], "sampling_params": parameters, **body})
        seeds = [request.seed ^ sample for sample in range(request.samples)]
        entries = [parameters | {"n": 1, "sampling_seed": seed} for seed in seeds]
        return Call("/generate", {"input_ids": [prompt] * len(seeds), "sampling_params": entries, **body})

    def interrupt(self) -> list[Call]:
        return [Call("/abort_request", {"abort_all": True})]

    def join_group(self, group_info: WeightGroupInfo) -> Call:
        body = {
            "master_address": group_info.host,
            "master_port": group_info.port,
            "rank_offset": 1,
            "world_size": group_info.world,
            "group_name": group_info.group,
            "backend": group_info.backend,
        }
        return Call("/init_weights_update_group", body)

    def before_update(self) -> list[Call]:
        return [Call("/pause_generation", {"mode": "retract"}), Call("/begin_weight_update", {})]

    def asks_for_places(self) -> Call | None:
        return None

    def other_ends(self, model: Path, *, found: bool) -> str | None:
        return other_ends_of_sglang(model, found=found)

    def places(self, answer: Any) -> Places:
        raise NotImplementedError("SGLang's workers take whole tensors")

    def update(
        self, bucket: Bucket, group: str | None, version: int, *, compare: bool, slices: Slices | None = None
    ) -> Call:
        assert slices is None
        common: dict[str, Any] = {"flush_cache": True, "weight_version": str(version)}
        has_parts = any(isinstance(name, PartName) for name, _ in bucket)
        bucket = [(_name_of(name), tensor) for name, tensor in bucket]
        if group is None:
            if has_parts:
                common["load_format"] = _LOADER
            # One for each worker: the memory is freed when all of them have been read.
            named = {"serialized_named_tensors": [_pickled(bucket) for _ in range(self._tensor)]}
            return Call("/update_weights_from_tensor", named | common)
        received = described(bucket) | {"group_name": group, "load_format": "flattened_bucket"}
        return Call("/update_weights_from_distributed", received | common)

    def after_update(self, version: int) -> list[Call]:
        return [Call("/end_weight_update", {})]

    def resume(self) -> list[Call]:
        return [Call("/continue_generation", {})]

    def sleep(self) -> list[Call]:
        # A release while a request runs ends the scheduler (an assertion). Pausing first makes the scheduler idle, and
        # the flush is refused if it is not. Weights are not kept without --enable-weights-cpu-backup.
        return [
            Call("/pause_generation", {"mode": "retract"}),
            Call("/flush_cache", {}),
            Call("/release_memory_occupation", {"tags": ["kv_cache", "weights"]}),
        ]

    def wake_weights(self) -> list[Call]:
        return [Call("/resume_memory_occupation", {"tags": ["weights"]})]

    def wake_cache(self) -> list[Call]:
        return [Call("/resume_memory_occupation", {"tags": ["kv_cache"]}), Call("/flush_cache", {})]

    def checksums(self) -> None:
        """SGLang's checksums are those of what is installed."""
        return

    def expected(self, bucket: Bucket) -> dict[str, tuple[str, float]]:
        """Of SGLang's parameters on each tensor rank; nothing of an FP8 weight, which a kernel may hold otherwise.

        Of experts on GPUs, this bucket's part of the sum of each parameter. On a CPU nothing.
        """
        of_experts: dict[str, tuple[str, float]] = {}
        if self._experts is not None and self._expert_sums is not None:
            of_experts = expert_sums(bucket, self._tensor, self._experts)
        bucket = [(name, tensor) for name, tensor in bucket if EXPERTS not in name]
        hashed, whole = bytes_hash if self._cpu else gpu_hash, self._wholes.add(bucket)
        return of_experts | {
            of_rank(name, rank, self._tensor): ("" if tensor.itemsize == 1 else hashed(tensor), math.nan)
            for name, rank, tensor in installed(whole, self._tensor, self._key_heads)
        }

    def parse_checksums(self, answer: Any) -> list[dict[str, tuple[str, float]]]:
        raise NotImplementedError

    def read_back(self, selection: Selection) -> Call:
        """The checksums of all parameters: SGLang has no way to ask for some of them by name."""
        return Call("/weights_checker", {"action": "checksum"})

    def not_installed(
        self, expected: dict[str, tuple[str, float]], selection: Selection, answer: Any
    ) -> list[tuple[str, float]]:
        """All parameters are compared; experts on GPUs, as far as SGLang's kernel leaves them in order."""
        held: dict[str, tuple[str, float]] = {}
        experts: dict[str, str] = {}
        for one in answer["ranks"]:
            rank, checksums = one["parallelism_info"][0]["tp_rank"], one["checksums"]
            dense = {name: total for name, total in checksums.items() if EXPERTS not in name}
            experts |= {of_rank(name, rank, self._tensor): of for name, of in checksums.items() if name not in dense}
            held |= {of_rank(name, rank, self._tensor): (total, math.nan) for name, total in dense.items()}
            embedding, head = (of_rank(name, rank, self._tensor) for name in (EMBEDDING, HEAD))
            if head in held and head not in expected and held[head] == held.get(embedding):
                del held[head]  # tied: sent under one name
        of_dense = {name: one for name, one in expected.items() if not is_piece(name)}
        unread = {name for name, (total, _) in of_dense.items() if not total}
        wanted = {name: one for name, one in of_dense.items() if name not in unread}
        wrong = differing(wanted, {name: one for name, one in held.items() if name not in unread})
        return wrong + ([] if self._expert_sums is None else self._expert_sums.differing(expected, experts))


def _with_plugin(folder: Path) -> dict[str, str]:
    """Make our plugin importable from `folder`, as an installed package with an entry point. Returns the environment.

    If the user's SGLANG_PLUGINS names the plugins to load, ours is one of them.
    """
    about = folder / f"{_PLUGIN_NAME}-1.dist-info"
    about.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(PLUGIN, folder / PLUGIN.name)
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {_PLUGIN_NAME}\nVersion: 1\n")
    (about / "entry_points.txt").write_text(f"[sglang.srt.plugins]\n{_PLUGIN_NAME} = {PLUGIN.stem}:register\n")
    named = os.environ.get("SGLANG_PLUGINS")
    return {"PYTHONPATH": str(folder)} | ({"SGLANG_PLUGINS": f"{named},{_PLUGIN_NAME}"} if named else {})


def _name_of(name: str) -> str:
    """A tensor's name; of a part, as `sglang_parts.py` reads it."""
    return f"q_proj:{name.whole}[{name.start}:{name.stop}:{name.rows}]" if isinstance(name, PartName) else name


def _copy_truncation(folder: Path) -> None:
    """Put the modules of our logit processor into the folder, which the server imports from."""
    for source, name in _MODULES.items():
        shutil.copyfile(source, folder / name)


def _stop_pattern(string: str) -> str:
    """A regular expression that finds the string, however many tokens it is made of.

    SGLang looks for a stop string in as many of the last tokens as its own encoding of the string has. A model may
    write it with more. For a regular expression it looks at as many tokens as the longest match has characters. The
    second branch matches nothing and is long enough: a token that is text has at least a byte.
    """
    return rf"{re.escape(string)}|[^\s\S]{{{len(string.encode())}}}"


def _cache_tokens(model: Path) -> int:
    """Tokens that a cache of `CACHE_BYTES_ON_CPU` holds: for each layer a key and a value of every group, in fp32."""
    config = read_json(model / "config.json", dict)
    head = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    return CACHE_BYTES_ON_CPU // (2 * 4 * config["num_hidden_layers"] * config["num_key_value_heads"] * head)


def _pickled(bucket: Bucket) -> str:
    """Names and tensors as SGLang unpickles them, by its allow-list: handles of their memory, not the bytes."""
    buffer = io.BytesIO()
    before = torch.multiprocessing.get_sharing_strategy()
    torch.multiprocessing.set_sharing_strategy("file_system")
    try:
        Pickler(buffer).dump(bucket)
    finally:
        torch.multiprocessing.set_sharing_strategy(before)
    return base64.b64encode(buffer.getvalue()).decode()
