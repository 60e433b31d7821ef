"""The experts that servers return for router replay: real SGLang servers, and vLLM's own classes.

vLLM's servers return none on a CPU: what records them requires Triton. So its classes write the answers here.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
from collections.abc import Coroutine, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor

from megatron_tempo.config.choices import EngineKind, EnginePrecision
from megatron_tempo.config.routing import RoutingFormat
from megatron_tempo.config.schema import ServersConfig
from megatron_tempo.rollout.answer_checks import checked_completions
from megatron_tempo.rollout.answer_experts import RoutingForm
from megatron_tempo.rollout.answer_formats import vllm_answers
from megatron_tempo.rollout.answer_reader import AnswerReader
from megatron_tempo.rollout.checksum import checksums_of
from megatron_tempo.rollout.connections import authorised
from megatron_tempo.rollout.engine import Request, Sampling
from megatron_tempo.rollout.partial_requests import joined, parts_of
from megatron_tempo.rollout.read_back import EVERYTHING
from megatron_tempo.rollout.replica import Ask, GenerationJob
from megatron_tempo.rollout.server import Server
from megatron_tempo.rollout.sglang import Sglang
from megatron_tempo.rollout.vllm import READ_BACK, Vllm
from megatron_tempo.types import UNFINISHED, Completion
from tests.engines.servers import ARGUMENTS, END, HEAD_DIM, PROMPTS, interpreter_of, warm_python
from tests.support import tiny

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]

LAYERS, POSITIONS = 3, 2048
ROUTING = RoutingFormat(LAYERS, tiny.PER_TOKEN, tiny.EXPERTS)
KEY = "a-key"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("moe") / "model"
    tiny.write_model(folder, family="qwen3_moe", layers=LAYERS, head_dim=HEAD_DIM, hidden=64)
    config = json.loads((folder / "config.json").read_text()) | {"max_position_embeddings": POSITIONS}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@torch.no_grad()
def of_a_pass(folder: Path, tokens: Sequence[int]) -> Tensor:
    """The choices of transformers' routers in a pass over a whole sequence, as sets: int64 [tokens, layers, k]."""
    network = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    logits = network(torch.tensor([list(tokens)]), output_router_logits=True).router_logits
    return torch.stack([of.topk(tiny.PER_TOKEN).indices for of in logits], dim=1).sort(-1).values


def assert_of_a_pass(folder: Path, prompt: Sequence[int], one: Completion) -> None:
    assert one.experts is not None
    wanted = of_a_pass(folder, [*prompt, *one.token_ids.tolist()])[:-1]
    assert torch.equal(one.experts.long().sort(-1).values, wanted)


# SGLang


@pytest.fixture(scope="module")
def sglang(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Sglang, Server]]:
    """A server with the weights of the folder, as the run starts it otherwise."""
    kind = EngineKind.sglang
    weights = [f"--model-path={model}", "--load-format=auto", "--weight-version=0"]
    config = ServersConfig(python=str(warm_python(kind)), arguments=[*ARGUMENTS[kind], *weights], start_seconds=240.0)
    adapter = Sglang(cpu=True, tensor=1, routing=ROUTING)
    folder = tmp_path_factory.mktemp("servers") / "0"
    server = Server(adapter, config, model, folder, KEY, EnginePrecision.fp32, "")
    try:
        server.wait()
        yield adapter, server
    finally:
        server.close()


def ask_of(request: Request, sampling: Sampling, *, paused: bool = False) -> Ask:
    job = GenerationJob()
    job.is_paused = paused
    return Ask(job, 0, request, sampling, oldest=0)


def run(work: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run(asyncio.wait_for(work, 240))


class Asking:
    """Asks a server as `Dispatcher` does."""

    def __init__(self, adapter: Sglang, server: Server) -> None:
        self.adapter, self.server = adapter, server
        self.reader = AnswerReader(adapter.answer_format, KEY, 120.0, ROUTING)

    async def __aenter__(self) -> Asking:
        await self.reader.open()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.reader.close()

    async def answer(self, ask: Ask) -> list[Completion]:
        parts = parts_of(ask)
        calls = [self.adapter.generate(part.request, part.sampling, [END]) for part in parts]
        asked = (self.reader.ask(self.server.url, call.path, call.body or {}, with_experts=True) for call in calls)
        raw = await asyncio.gather(*asked)
        pairs = zip(raw, parts, strict=True)
        return joined(ask.request, [checked_completions(one, part, tiny.VOCAB, 0, ROUTING) for one, part in pairs])

    async def post(self, path: str, body: dict[str, Any]) -> None:
        async with httpx.AsyncClient(headers=authorised(KEY), trust_env=False) as client:
            assert (await client.post(self.server.url + path, json=body)).status_code == 200


def test_sglangs_experts_are_those_of_a_full_forward_pass(sglang: tuple[Sglang, Server], model: Path) -> None:
    """Several samples of a prompt share its prefill, and a second request finds the prompt in the cache."""

    async def work() -> list[list[Completion]]:
        async with Asking(*sglang) as asking:
            sampling = Sampling(1.0, 24, with_experts=True)
            return [await asking.answer(ask_of(Request(prompt, 3, 0), sampling)) for prompt in PROMPTS * 2]

    for prompt, rows in zip(PROMPTS * 2, run(work()), strict=True):
        assert len(rows) == 3
        for one in rows:
            assert_of_a_pass(model, prompt, one)


def test_sglangs_interrupted_responses_continue_with_their_experts(sglang: tuple[Sglang, Server], model: Path) -> None:
    """The first part's experts are kept, and the continuation asks for those of the tokens after."""
    prompt, longest = PROMPTS[1], 1900  # it takes longer than any of the delays

    async def work() -> tuple[list[Completion], list[Completion]]:
        async with Asking(*sglang) as asking:
            sampling = Sampling(1.0, longest, with_experts=True)
            request = Request(prompt, 2, 0)
            # Until it is interrupted after its first tokens. A request that comes after the call is not interrupted.
            for delay in (0.05 * 2**i for i in range(7)):
                ask = ask_of(request, sampling, paused=True)
                call = asking.adapter.generate(request, sampling, [])
                assert call.body is not None
                call.body["sampling_params"]["ignore_eos"] = True
                begun = asyncio.create_task(asking.reader.ask(sglang[1].url, call.path, call.body, with_experts=True))
                await asyncio.sleep(delay)
                for stop in asking.adapter.interrupt():
                    await asking.post(stop.path, stop.body or {})
                first = checked_completions(await begun, ask, tiny.VOCAB, 0, ROUTING)
                if all(len(one.token_ids) and one.finish_reason == UNFINISHED for one in first):
                    break
            ask.request = replace(request, begun=tuple(first))
            return first, await asking.answer(ask)

    first, whole = run(work())
    assert {one.finish_reason for one in first} == {UNFINISHED}
    for begun, one in zip(first, whole, strict=True):
        assert one.finish_reason in ("stop", "length")
        assert one.token_ids[: len(begun.token_ids)].tolist() == begun.token_ids.tolist()
        assert_of_a_pass(model, prompt, one)


# vLLM

# Makes requests of ours objects of vLLM's, and writes answers with experts as vLLM's server does.
BY_VLLM = """
import json, sys
import numpy as np
from vllm.entrypoints.scale_out.token_in_token_out import protocol
from vllm.utils.serial_utils import numpy2base64
answers = []
for given in json.load(sys.stdin):
    request = protocol.GenerateRequest(**given["request"]) if hasattr(protocol, "GenerateRequest") else None
    start = None if request is None else request.sampling_params.routed_experts_prompt_start
    experts = np.array(given["experts"], dtype=given["dtype"])
    choice = protocol.GenerateTokensChoice(
        index=0, token_ids=[5, 6], finish_reason="stop", routed_experts=numpy2base64(experts),
        weight_versions=[{"version": "3", "start": 0, "end": 2}],
        logprobs={"content": [{"token_id": 5, "logprob": -0.5}, {"token_id": 6, "logprob": -0.25}]},
    )
    answers.append({"start": start, "choices": [choice.model_dump()]})
print(json.dumps(answers))
"""


def test_vllms_own_classes_take_our_requests_and_write_what_we_read() -> None:
    """In one process: vLLM's import takes half a minute."""
    sampling, draw = Sampling(1.0, 9, with_experts=True), np.random.default_rng(0)
    cases, given = [("uint8", ROUTING), ("uint16", RoutingFormat(2, 3, 512))], []
    for dtype, routing in cases:
        request = Request((1, 2, 3), 1, 0, experts_from=2)
        call = Vllm(cpu=False, tensor=1, routing=routing).generate(request, sampling, [END])
        experts = draw.random((4, routing.layers, routing.experts)).argsort(-1)[..., : routing.per_token]
        given.append({"request": call.body, "experts": experts.tolist(), "dtype": dtype})
    python = interpreter_of(EngineKind.vllm)
    done = subprocess.run([python, "-c", BY_VLLM], input=json.dumps(given), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    answers = json.loads(done.stdout.splitlines()[-1])
    for (_, routing), one, answer in zip(cases, given, answers, strict=True):
        assert answer["start"] == 2
        form = RoutingForm(routing.layers, routing.per_token, routing.experts, routing.itemsize)
        read = vllm_answers(json.dumps(answer).encode(), form)
        assert [(row.tokens, row.routed, row.versions) for row in read.rows] == [(2, 4, [(3, 2)])]
        kept = np.frombuffer(read.experts[0], np.uint8 if routing.itemsize == 1 else np.int16)
        assert kept.tolist() == np.ravel(one["experts"]).tolist()


# What vLLM's own loaders and its own conversion for a kernel make of a layer's experts on each worker, as our module
# reads it back.
LOADED_BY_VLLM = """
import json, sys
from types import SimpleNamespace
import torch
from safetensors.torch import load_file
from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig
from vllm.model_executor.layers.fused_moe.expert_map_manager import determine_expert_map
from vllm.model_executor.layers.fused_moe.oracle.unquantized import (
    UnquantizedMoeBackend, convert_to_unquantized_kernel_format)
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod
import vllm_read_back
given = json.loads(sys.argv[1])
sent, name, experts, ranks = load_file(given["file"]), given["name"], given["experts"], given["ranks"]
fields = FusedMoEConfig.__dataclass_fields__
assert {"intermediate_size_per_partition_unpadded", "hidden_dim_unpadded", "tp_shard_with_padding"} <= fields.keys()
ffn, hidden = sent[f"{name}.0.gate_proj.weight"].shape

def answer(rank, apart, backend):
    cut, tp_rank, numbers, count = ranks, rank, None, experts
    if apart:
        cut, tp_rank, (count, numbers, _) = 1, 0, determine_expert_map(ranks, rank, experts)
    layer = RoutedExperts.__new__(RoutedExperts)
    torch.nn.Module.__init__(layer)
    parallel = SimpleNamespace(tp_size=cut, tp_rank=tp_rank, enable_eplb=False)
    layer.moe_config = SimpleNamespace(
        moe_parallel_config=parallel, tp_rank=tp_rank, tp_shard_with_padding=False, is_act_and_mul=True,
        intermediate_size_per_partition_unpadded=ffn // cut, hidden_dim_unpadded=hidden)
    place = lambda one: one if numbers is None else int(numbers[one])
    layer.expert_map_manager = SimpleNamespace(expert_map=numbers, map_global_to_local=place)
    layer.global_num_experts, layer.quant_config, layer._fused_shared_expert_quantizer = experts, None, None
    method = UnquantizedFusedMoEMethod.__new__(UnquantizedFusedMoEMethod)
    object.__setattr__(method, "unquantized_backend", backend)
    object.__setattr__(layer, "quant_method", method)
    for own, shape in (("w13_weight", (count, 2 * ffn // cut, hidden)), ("w2_weight", (count, hidden, ffn // cut))):
        setattr(layer, own, torch.nn.Parameter(torch.full(shape, torch.nan), requires_grad=False))
    for expert in range(experts):
        for part, own, shard in (("gate", "w13", "w1"), ("up", "w13", "w3"), ("down", "w2", "w2")):
            parameter, tensor = getattr(layer, f"{own}_weight"), sent[f"{name}.{expert}.{part}_proj.weight"]
            layer.weight_loader(parameter, tensor, f"{own}_weight", shard, expert, return_success=True)
    new = convert_to_unquantized_kernel_format(backend, layer.moe_config, layer.w13_weight, layer.w2_weight, layer)
    layer.w13_weight, layer.w2_weight = (torch.nn.Parameter(one.data, requires_grad=False) for one in new)
    model = parent = torch.nn.Module()
    for word in name.split("."):
        parent.add_module(word, torch.nn.Module())
        parent = parent.get_submodule(word)
    parent.add_module("routed_experts", layer)
    return vllm_read_back.read_back(model, 0, 1, tied=False)

print(json.dumps([
    [kernel, apart, {"results": [answer(rank, apart, UnquantizedMoeBackend[kernel]) for rank in range(ranks)]}]
    for kernel in given["kernels"] for apart in (False, True)
]))
"""


def test_experts_are_read_back_as_vllms_own_loaders_place_them(tmp_path: Path) -> None:
    """Cut by two workers, and each on one of them. The kernels need a GPU, but not what prepares weights for them."""
    name, ranks, kernels = "model.layers.0.mlp.experts", 2, ["TRITON", "BATCHED_TRITON", "FLASHINFER_CUTLASS"]
    shapes = {"gate_proj": (24, 32), "up_proj": (24, 32), "down_proj": (32, 24)}
    names = [(expert, part) for expert in range(5) for part in shapes]
    sent = {f"{name}.{expert}.{part}.weight": torch.randn(shapes[part]) for expert, part in names}
    file = str(tmp_path / "sent.safetensors")
    save_file(sent, file)
    shutil.copyfile(READ_BACK, tmp_path / READ_BACK.name)
    given = {"file": file, "name": name, "experts": 5, "ranks": ranks, "kernels": kernels}
    command = [interpreter_of(EngineKind.vllm), "-c", LOADED_BY_VLLM, json.dumps(given)]
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    adapter, expected = Vllm(cpu=False, tensor=ranks), checksums_of(list(sent.items()))
    other = f"{name}.3.up_proj.weight"
    wrong = expected | checksums_of([(other, torch.zeros(24, 32))])
    answers = json.loads(done.stdout.splitlines()[-1])
    assert [answer[:2] for answer in answers] == [[kernel, apart] for kernel in kernels for apart in (False, True)]
    for _, _, answer in answers:
        assert [one["unread"] for one in answer["results"]] == [[]] * ranks
        assert adapter.not_installed(expected, EVERYTHING, answer) == []
        assert [one for one, _ in adapter.not_installed(wrong, EVERYTHING, answer)] == [other]


@pytest.mark.release
def test_vllms_server_knows_the_flag_that_records_experts() -> None:
    """Its argument parser does; the rest of the command line is tried by every other test."""
    python = interpreter_of(EngineKind.vllm)
    code = (
        "from vllm.engine.arg_utils import EngineArgs; from vllm.utils.argparse_utils import FlexibleArgumentParser\n"
        "a = EngineArgs.add_cli_args(FlexibleArgumentParser()).parse_args(['--enable-return-routed-experts'])\n"
        "print(a.enable_return_routed_experts)"
    )
    done = subprocess.run([python, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines()[-1] == "True"
