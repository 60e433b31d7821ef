"""Helpers for tests with real servers: configs, tiny models, and a comparison with transformers."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file

from megatron_tempo.config.choices import EngineKind
from megatron_tempo.config.schema import Config
from megatron_tempo.rollout.engine import Request, Sampling
from megatron_tempo.rollout.servers import ServersEngine
from megatron_tempo.training.context import RunContext, open_context
from megatron_tempo.training.setup import build_engine
from megatron_tempo.types import Completion
from tests.engines.warm import server_group
from tests.support import tiny
from tests.support.logged import logged

ROOT = Path(__file__).parents[2]
ENGINES = (EngineKind.sglang, EngineKind.vllm)
END, ENDING, NO_END = tiny.WORDS.index("$"), 45, 44
# On a CPU, SGLang pads other sizes, which changes its checksums. vLLM does not support smaller heads.
FFN, HEAD_DIM = 64, 32
PROMPTS = [(5, 7, 8), (9, 4, 1, 2, 3), (60,), tuple(range(20))]
REQUESTS = [Request(prompt, samples=3, seed=i) for i, prompt in enumerate(PROMPTS)]
ARGUMENTS = {
    EngineKind.sglang: ["--max-total-tokens=4096", "--max-running-requests=32"],
    EngineKind.vllm: ["--max-num-seqs=32", f"--kv-cache-memory-bytes={64 << 20}"],
}
WARM = "WARM_ENGINES"  # the variable that names the folder of the warm engines
# What a server's processes import.
MODULES = {
    EngineKind.sglang: [
        "sglang.launch_server",
        "sglang.srt.entrypoints.http_server",
        "sglang.srt.layers.attention.torch_native_backend",
        "sglang.srt.managers.detokenizer_manager",
        "sglang.srt.managers.scheduler",
        "sglang.srt.models.olmo2",  # olmo3 as well
        "sglang.srt.models.llama",
        "sglang.srt.models.qwen2",
        "sglang.srt.models.qwen3",
        "sglang.srt.models.qwen3_moe",
    ],
    EngineKind.vllm: [
        "vllm.entrypoints.openai.api_server",
        "vllm.model_executor.models.transformers",  # which serves olmo3
        "vllm.model_executor.models.llama",
        "vllm.model_executor.models.qwen2",
        "vllm.model_executor.models.qwen3",
        "vllm.model_executor.models.qwen3_moe",
        "vllm.v1.engine.core",
        "vllm.v1.executor.multiproc_executor",
        "vllm.v1.worker.cpu_worker",
    ],
}

MODELS: dict[str, dict[str, Any]] = {
    "untied": {},
    "tied": {"tied": True},
    "experts": {"family": "qwen3_moe", "layers": 2},  # vLLM's kernel for a CPU needs a multiple of 32 hidden numbers
    "llama": {"family": "llama", "tied": True},
    "qwen2": {"family": "qwen2", "hidden": 4 * HEAD_DIM},
    "olmo3": {"family": "olmo3", "hidden": 4 * HEAD_DIM},  # SGLang's OLMo3 divides the hidden size by the heads
}


def write_model(folder: Path, kind: str = "untied", *, seed: int = 0) -> Path:
    """Write a model with a generation_config.json of which only the end token counts.

    Its sampling would make all responses equal. The end token of config.json is another one, which must not count.
    """
    tiny.write_model(folder, seed=seed, ffn=FFN, head_dim=HEAD_DIM, **MODELS[kind])
    config = json.loads((folder / "config.json").read_text()) | {"eos_token_id": NO_END}
    (folder / "config.json").write_text(json.dumps(config))
    sampling = {"do_sample": True, "temperature": 0.01, "top_k": 1, "top_p": 0.1, "eos_token_id": END}
    (folder / "generation_config.json").write_text(json.dumps(sampling))
    return folder


def write_endless_models(folder: Path, *, positions: int) -> tuple[Path, Path]:
    """Two models that differ in the end token's row of the output layer only: caches of one are right for the other.

    By the first, a response to a prompt that ends with `ENDING` repeats this token and ends after a few of them; any
    other response does not end, since the end token's logit is lower by over 50. By the second, all responses end.
    """
    endless, ends = write_model(folder / "endless"), folder / "ends"
    config = json.loads((endless / "config.json").read_text()) | {"max_position_embeddings": positions}
    (endless / "config.json").write_text(json.dumps(config))
    weights = load_file(endless / "model.safetensors")
    for name, matrix in weights.items():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            matrix[:2] = 0.0  # no layer writes to the first two channels
    weights["model.norm.weight"][:2] = 1.0
    embedding, head = weights["model.embed_tokens.weight"], weights["lm_head.weight"]
    embedding[:, 0], embedding[:, 1] = 4.0, 0.0  # the same for all tokens
    embedding[ENDING, 1] = 4.0
    of_end = head[END].clone()
    head[ENDING], head[END] = 0.0, 0.0
    head[ENDING, 0], head[ENDING, 1] = -100.0, 130.0
    head[END, 0], head[END, 1] = -104.0, 130.0
    save_file(weights, endless / "model.safetensors", {"format": "pt"})
    shutil.copytree(endless, ends)
    head[END] = of_end
    head[END, 0], head[END, 1] = 6.0, 0.0
    save_file(weights, ends / "model.safetensors", {"format": "pt"})
    return endless, ends


def config_of(kind: EngineKind, model: Path, run: Path) -> Config:
    config = Config()
    config.model.path, config.run.dir = str(model), str(run)
    use_servers(config, kind)
    return config


def use_servers(config: Config, kind: EngineKind) -> None:
    """Configure real servers on a CPU, with timeouts short enough for a test."""
    config.parallel.bucket_mb = 1
    config.rollout.engine = kind
    servers = config.rollout.servers
    servers.python = str(warm_python(kind))
    servers.arguments = ARGUMENTS[kind]
    servers.start_seconds, servers.update_seconds, servers.hang_seconds = 240.0, 30.0, 20.0


def warm_python(kind: EngineKind) -> Path:
    """The program that starts servers of an engine that is imported already."""
    return Path(os.environ[WARM]) / kind.name / "python"


def interpreter_of(kind: EngineKind) -> Path:
    """The Python of an engine's environment."""
    return ROOT / f".venv-{kind.name}/bin/python"


def group_of(engine: ServersEngine, index: int) -> int:
    """The process group of a server, which is also the process that its others are children of."""
    assert engine._supervisor is not None
    group = engine._supervisor._servers[index].process.pid
    return server_group(group, [warm_python(kind).parent for kind in ENGINES])


@contextmanager
def opened(config: Config, messages: list[str]) -> Iterator[tuple[RunContext, ServersEngine]]:
    """The engine of a config, in this rank's process groups. `messages` collects its warnings."""
    with open_context(config) as context, logged(logging.WARNING, messages):
        engine = build_engine(context)
        assert isinstance(engine, ServersEngine)
        try:
            yield context, engine
        finally:
            engine.close()


def answers(engine: ServersEngine, requests: list[Request], sampling: Sampling) -> dict[int, list[Completion]]:
    """The answers that this rank gets. Asserts that each comes once."""
    by_number: dict[int, list[Completion]] = {}
    for number, completions in engine.start(requests, sampling):
        assert number not in by_number
        by_number[number] = completions
    return by_number


def assert_said_by(model: Path, completions_of: dict[int, list[Completion]], version: int, temperature: float) -> None:
    """Every request is answered, and the log-probabilities are those of transformers' model."""
    reference = transformers.AutoModelForCausalLM.from_pretrained(model)
    assert sorted(completions_of) == list(range(len(PROMPTS)))
    for number, completions in completions_of.items():
        assert len(completions) == 3
        for completion in completions:
            assert completion.versions == ((version, len(completion.token_ids)),)
            assert 1 <= len(completion.token_ids) <= 8
            assert (completion.token_ids[-1] == END) == (completion.finish_reason == "stop")
            prompt = PROMPTS[number]
            tokens = torch.tensor([*prompt, *completion.token_ids])
            with torch.no_grad():
                logs = (reference(tokens[None]).logits[0, len(prompt) - 1 : -1] / temperature).log_softmax(-1)
            wanted = logs.gather(1, tokens[len(prompt) :, None])[:, 0]
            torch.testing.assert_close(completion.logprobs, wanted, atol=1e-4, rtol=0)
