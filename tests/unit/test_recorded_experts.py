"""The experts that an engine's routers chose: in answers, parts of responses, batches, files, the embedded engine."""

from __future__ import annotations

import asyncio
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import transformers
from numpy.typing import NDArray
from torch import Tensor

from megatron_tempo.config.choices import EngineKind, EnginePrecision, RouterReplay
from megatron_tempo.config.routing import RoutingFormat
from megatron_tempo.config.schema import Config, ServersConfig
from megatron_tempo.errors import EngineError, InputError
from megatron_tempo.rollout import dump
from megatron_tempo.rollout.answer_checks import checked_completions
from megatron_tempo.rollout.answer_experts import RoutingForm
from megatron_tempo.rollout.answer_formats import ANSWER_FORMATS
from megatron_tempo.rollout.answer_reader import AnswerReader, CannotAnswer, RawAnswers
from megatron_tempo.rollout.batches import Answers, receive, share_columns
from megatron_tempo.rollout.build import server_adapter_of
from megatron_tempo.rollout.embedded import EmbeddedEngine
from megatron_tempo.rollout.engine import Request, Sampling
from megatron_tempo.rollout.experts import filled
from megatron_tempo.rollout.partial_requests import joined, parts_of
from megatron_tempo.rollout.replica import Ask, GenerationJob
from megatron_tempo.rollout.server_adapter import Start
from megatron_tempo.rollout.sglang import Sglang
from megatron_tempo.rollout.vllm import Vllm
from megatron_tempo.types import UNFINISHED, Batch, Completion, UnlabelledPrompt, known_experts
from tests.support.answers import BODIES, Answer, Said, answering
from tests.support.completions import completion
from tests.support.ranks import run_ranks
from tests.support.tiny import EXPERTS, PER_TOKEN, write_model
from tests.support.weights import Given, tensors

KINDS = list(BODIES)
LAYERS = 3
FORMAT = RoutingFormat(LAYERS, 2, 8)
FORM = RoutingForm(LAYERS, 2, 8, 1)
PROMPT = (5, 6, 7)


def chosen(tokens: int, seed: int = 0, form: RoutingFormat = FORMAT) -> NDArray[Any]:
    """Distinct experts of each token in each layer."""
    draw = np.random.default_rng(seed)
    order = draw.random((tokens, form.layers, form.experts)).argsort(-1)
    return order[..., : form.per_token]


@pytest.mark.parametrize(
    ("experts", "per_token", "wanted"), [(128, 8, 384), (256, 8, 384), (257, 8, 768), (255, 1, 48), (256, 1, 96)]
)
def test_bytes_of_a_token(experts: int, per_token: int, wanted: int) -> None:
    """Qwen3-30B-A3B has 48 layers; an expert's number takes a byte as long as one is left for what is not known."""
    assert RoutingFormat(48, per_token, experts).bytes_per_token == wanted


# Servers' answers


def said(tokens: int = 4, reason: str = "stop", experts: NDArray[Any] | None = None) -> Said:
    return Said(list(range(tokens)), [-0.5] * tokens, [("2", 0, tokens)], reason, experts)


def raw(kind: str, responses: list[Said], form: RoutingForm = FORM) -> RawAnswers:
    answers = ANSWER_FORMATS[kind](json.dumps(BODIES[kind](responses)).encode(), form)
    experts = np.frombuffer(b"".join(answers.experts), np.uint8)
    return RawAnswers(answers.rows, np.array(answers.tokens), np.array(answers.logprobs), 0.0, experts)


def asked(samples: int = 1, *, with_experts: bool = True, paused: bool = False, begun: int = 0) -> Ask:
    """`begun`: tokens that a response has before this request."""
    job = GenerationJob()
    job.is_paused = paused
    request = Request((*PROMPT, *range(begun)), samples, 0, experts_from=len(PROMPT) + begun - 1 if begun else 0)
    return Ask(job, 0, request, Sampling(1.0, 9, with_experts=with_experts), oldest=2)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", [FORMAT, RoutingFormat(LAYERS, 4, 300)])
def test_completions_have_the_experts_of_all_tokens_but_the_last(kind: str, form: RoutingFormat) -> None:
    """In one byte or two; each response its own."""
    parts = [chosen(6, 1, form), chosen(4, 2, form)]
    answers = raw(
        kind,
        [said(4, experts=parts[0]), said(2, experts=parts[1])],
        RoutingForm(form.layers, form.per_token, form.experts, form.itemsize),
    )
    completions = checked_completions(answers, asked(2), 100, 2, form)
    for one, part in zip(completions, parts, strict=True):
        assert one.experts is not None
        assert one.experts.dtype == (torch.uint8 if form.itemsize == 1 else torch.int16)
        assert np.array_equal(one.experts.numpy(), part)


@pytest.mark.parametrize("kind", KINDS)
def test_experts_that_are_not_asked_for_are_not_read(kind: str) -> None:
    """Those of an evaluation, and of a run without replay."""
    body = json.dumps(BODIES[kind]([said(experts=chosen(6))])).encode()
    assert ANSWER_FORMATS[kind](body).experts == []
    one = checked_completions(raw(kind, [said(experts=chosen(6))]), asked(with_experts=False), 100, 2, FORMAT)
    assert one[0].experts is None


WRONG = {
    "another model's": (chosen(6, form=RoutingFormat(5, 2, 8)), "layers|shape"),
    "no expert": (chosen(6) + 1, "experts from 1 to 8 in a model that has 8"),
    "not recorded": (np.zeros((6, LAYERS, 2), np.int32), "the same expert twice"),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", WRONG)
def test_experts_that_no_router_chooses_are_refused(kind: str, name: str) -> None:
    """SGLang's have no shape: those of five layers are refused if they are not a multiple of three layers."""
    experts, words = WRONG[name]
    if name == "another model's":
        experts = experts[:4]
    with pytest.raises(ValueError, match=words):
        raw(kind, [said(experts=experts)])


@pytest.mark.parametrize("kind", KINDS)
def test_a_server_that_returns_no_experts_is_named_with_a_fix(kind: str) -> None:
    with pytest.raises(CannotAnswer) as caught:
        checked_completions(raw(kind, [said()]), asked(), 100, 2, FORMAT)
    assert "--enable-return-routed-experts" in str(caught.value)
    assert "model.router_replay=off" in str(caught.value)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tokens", [5, 7])
def test_experts_of_other_tokens_are_refused(kind: str, tokens: int) -> None:
    with pytest.raises(EngineError, match=f"experts of {tokens} tokens, not of 6"):
        checked_completions(raw(kind, [said(experts=chosen(tokens))]), asked(), 100, 2, FORMAT)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("experts", [None, chosen(2), chosen(7)], ids=["none", "some", "one too many"])
def test_an_interrupted_response_may_have_fewer(kind: str, experts: NDArray[Any] | None) -> None:
    answers = raw(kind, [said(4, "abort", experts)])
    one = checked_completions(answers, asked(paused=True), 100, 2, FORMAT)[0]
    assert one.finish_reason == UNFINISHED
    assert (one.experts is None) == (experts is None)


@pytest.mark.parametrize("kind", KINDS)
def test_the_process_that_reads_answers_passes_them_on(kind: str) -> None:
    experts = chosen(6, 3)
    good = Answer(json.dumps(BODIES[kind]([said(experts=experts)])).encode())

    async def whole() -> tuple[RawAnswers, RawAnswers]:
        with answering(lambda path, body: good) as server:
            reader = AnswerReader(kind, "key", 60.0, FORMAT)
            await reader.open()
            try:
                with_them = await reader.ask(server.url, "/generate", {}, with_experts=True)
                return with_them, await reader.ask(server.url, "/generate", {})
            finally:
                await reader.close()

    with_them, without = asyncio.run(asyncio.wait_for(whole(), 120))
    one = checked_completions(with_them, asked(), 100, 2, FORMAT)[0]
    assert one.experts is not None
    assert np.array_equal(one.experts.numpy(), experts)
    assert (without.rows[0].routed, len(without.experts)) == (None, 0)


# Requests


def test_requests_name_the_first_token_whose_experts_are_wanted() -> None:
    sglang, vllm = Sglang(cpu=True, tensor=1, routing=FORMAT), Vllm(cpu=True, tensor=1, routing=FORMAT)
    sampling = Sampling(1.0, 9, with_experts=True)
    body = sglang.generate(Request(PROMPT, 1, 0, experts_from=2), sampling, [0]).body
    assert body is not None
    assert (body["return_routed_experts"], body["routed_experts_start_len"]) == (True, 2)
    body = vllm.generate(Request(PROMPT, 1, 0, experts_from=2), sampling, [0]).body
    assert body is not None
    assert body["sampling_params"]["routed_experts_prompt_start"] == 2


def test_an_evaluation_gets_no_experts_of_its_prompts() -> None:
    """vLLM returns them to each request, those of the prompt from a token on; SGLang to those that ask."""
    plain = Sampling(1.0, 9)
    body = Sglang(cpu=True, tensor=1, routing=FORMAT).generate(Request(PROMPT, 1, 0), plain, [0]).body
    assert body is not None
    assert "return_routed_experts" not in body
    body = Vllm(cpu=True, tensor=1, routing=FORMAT).generate(Request(PROMPT, 1, 0), plain, [0]).body
    assert body is not None
    assert body["sampling_params"]["routed_experts_prompt_start"] == len(PROMPT)
    body = Vllm(cpu=True, tensor=1).generate(Request(PROMPT, 1, 0), plain, [0]).body
    assert body is not None
    assert "routed_experts_prompt_start" not in body["sampling_params"]


@pytest.mark.parametrize("adapter", [Sglang, Vllm])
@pytest.mark.parametrize("routing", [None, FORMAT])
def test_servers_record_experts_only_for_a_run_that_uses_them(
    adapter: Any, routing: RoutingFormat | None, tmp_path: Path
) -> None:
    model = write_model(tmp_path / "model", layers=1)
    (own := tmp_path / "server").mkdir()
    start = Start(ServersConfig(), model, own, "127.0.0.1", 1234, "key", EnginePrecision.fp32)
    command = adapter(cpu=True, tensor=1, routing=routing).launch(start).command
    assert ("--enable-return-routed-experts" in command) == (routing is not None)


# Parts of responses


def begun(tokens: int, experts: Tensor | None) -> Completion:
    one = completion(range(tokens), [-0.5] * tokens, UNFINISHED)
    return dataclasses.replace(one, experts=experts)


def test_each_token_keeps_the_experts_of_the_pass_that_made_its_logprob() -> None:
    """A response of 2 + 3 tokens. The pass over its second token made the third one's log-probability."""
    first = begun(2, torch.from_numpy(chosen(4, 1).astype(np.uint8)))  # 3 of the prompt, 1 of 2
    request = Request(PROMPT, 1, 0, begun=(first,))
    part = parts_of(dataclasses.replace(asked(), request=request))[0]
    assert (len(part.request.token_ids), part.request.experts_from) == (5, 4)
    more = dataclasses.replace(begun(3, torch.from_numpy(chosen(3, 2).astype(np.uint8))), finish_reason="stop")
    whole = joined(request, [[more]])[0].experts
    assert whole is not None
    assert len(whole) == len(PROMPT) + 5 - 1
    assert torch.equal(whole[:4], first.experts)
    assert torch.equal(whole[4:], more.experts)


@pytest.mark.parametrize("tokens", [0, 2, 5])
def test_what_an_interrupted_server_did_not_return_is_unknown(tokens: int) -> None:
    """Of four that it should; a fifth is that of the token whose pass the continuation repeats."""
    first = begun(2, torch.from_numpy(chosen(tokens, 1).astype(np.uint8)) if tokens else None)
    more = begun(3, torch.from_numpy(chosen(3, 2).astype(np.uint8)))
    whole = joined(Request(PROMPT, 1, 0, begun=(first,)), [[more]])[0].experts
    assert whole is not None
    assert known_experts(whole)[:, 0].tolist() == [place < min(tokens, 4) or place >= 4 for place in range(7)]
    assert torch.equal(whole[4:], more.experts)


def test_a_response_that_had_no_token_yet_gets_all_of_its_continuation() -> None:
    first, more = begun(0, None), begun(3, torch.from_numpy(chosen(5, 2).astype(np.uint8)))
    request = Request(PROMPT, 1, 0, begun=(first,))
    assert parts_of(dataclasses.replace(asked(), request=request))[0].request.experts_from == 0
    assert torch.equal(joined(request, [[more]])[0].experts, more.experts)  # type: ignore[arg-type]


# Batches and files

PROMPTS = [UnlabelledPrompt(f"u:{i}", f"{i}", tuple(range(i + 1))) for i in range(3)]


def completions_of(i: int, form: RoutingFormat) -> list[Completion]:
    """Two responses to a prompt; the second one to the last prompt has no experts."""
    rows = []
    for sample in range(2):
        tokens = 2 + i + sample
        kept = chosen(i + 1 + tokens - 1, 10 * i + sample, form)
        experts = torch.from_numpy(kept).to(torch.uint8 if form.itemsize == 1 else torch.int16)
        one = completion(range(tokens), [-0.5] * tokens)
        rows.append(one if (i, sample) == (2, 1) else dataclasses.replace(one, experts=experts))
    return rows


def wanted_rows(form: RoutingFormat) -> list[Tensor]:
    """The experts of each row's prompt and response, with unknown ones where there are none."""
    rows = []
    for i in range(3):
        for one in completions_of(i, form):
            empty = torch.zeros(
                0, form.layers, form.per_token, dtype=torch.uint8 if form.itemsize == 1 else torch.int16
            )
            rows.append(filled(empty if one.experts is None else one.experts, i + 1 + len(one.token_ids)))
    return rows


FORMATS = [FORMAT, RoutingFormat(3, 3, 600)]


def over_ranks(kept: Sequence[int]) -> list[Batch]:
    """Each prompt is answered on another rank, or all on the first. Rank 1 needs the last layer of every second row."""
    dist.init_process_group("gloo")
    batches = []
    for form in FORMATS:
        for owner in (lambda i: i % 2, lambda i: 0):
            mine = {i: completions_of(i, form) for i in range(3) if owner(i) == dist.get_rank()}
            collected = share_columns(PROMPTS, Answers(mine, {}, {})).take(0, 3)
            second = dist.get_rank() == 1
            held = torch.arange(6)[1::2] if second else torch.arange(6)
            layers = torch.tensor(kept) if second else None
            batches.append(receive(collected, held, window=5, layers=layers))
    dist.destroy_process_group()
    return batches


def test_a_rank_gets_the_experts_of_its_rows_in_its_layers(tmp_path: Path) -> None:
    """In windows of five numbers of four bytes, smaller than most rows."""
    ranks = run_ranks(over_ranks, 2, tmp_path, [2])
    for number in range(4):
        rows = wanted_rows(FORMATS[number // 2])
        assert torch.equal(ranks[0][number].experts, torch.cat(rows))
        assert torch.equal(ranks[1][number].experts, torch.cat(rows[1::2])[:, [2]])
        assert ranks[0][number].experts.dtype == rows[0].dtype


def batch_with_experts(single: None) -> Batch:
    answers = Answers({i: completions_of(i, FORMAT) for i in range(3)}, {}, {})
    return receive(share_columns(PROMPTS, answers).take(0, 3), torch.arange(6))


def test_selected_and_joined_rows_keep_their_experts(single: None) -> None:
    batch, rows = batch_with_experts(single), wanted_rows(FORMAT)
    picked = batch.select(torch.tensor([4, 1]))
    assert torch.equal(picked.experts, torch.cat([rows[4], rows[1]]))  # type: ignore[arg-type]
    both = Batch.join(batch, picked)
    assert torch.equal(both.experts, torch.cat([*rows, rows[4], rows[1]]))  # type: ignore[arg-type]


def test_a_batch_without_recorded_experts_has_none(single: None) -> None:
    plain = {i: [dataclasses.replace(one, experts=None) for one in completions_of(i, FORMAT)] for i in range(3)}
    assert receive(share_columns(PROMPTS, Answers(plain, {}, {})).take(0, 3), torch.arange(6)).experts is None


@pytest.fixture
def recorded(single: None, tmp_path: Path) -> Path:
    """A file of rollouts whose rows all have experts."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(write_model(tmp_path / "model", layers=1))
    path = dump.path_of(tmp_path / "rollouts", "stage1", 3)
    answers = {i: completions_of(i, FORMAT) for i in range(3)}
    answers[2][1] = dataclasses.replace(answers[2][1], experts=torch.from_numpy(chosen(7, 5).astype(np.uint8)))
    collected = share_columns(PROMPTS, Answers(answers, {}, {})).take(0, 3)
    with dump.Recorder(path, tokenizer) as recorder:
        watch = recorder.of(PROMPTS, collected.columns)
        receive(collected, torch.arange(6), watch, window=9, layers=torch.tensor([0]), watch_experts=recorder.experts)
    return path


def test_a_file_of_rollouts_keeps_all_layers_in_a_file_of_its_own(recorded: Path) -> None:
    assert sorted(file.name for file in recorded.parent.iterdir()) == ["stage1-000003.experts", "stage1-000003.jsonl"]
    answers = dump.read(recorded, [], PROMPTS, 2, routing=FORMAT)
    rows = [one.experts for i in range(3) for one in answers.completions[i]]
    wanted = wanted_rows(FORMAT)
    for row, (read, of) in enumerate(zip(rows, wanted, strict=True)):
        assert read is not None
        assert torch.equal(read[:-1], of[:-1] if row < 5 else torch.from_numpy(chosen(7, 5).astype(np.uint8)))
        assert not known_experts(read[-1]).any()
    sizes = sum(map(len, wanted)) * FORMAT.bytes_per_token
    assert dump.experts_path(recorded).stat().st_size == sizes, "a byte for each expert, and nothing else"
    plain = dump.read(recorded, [], PROMPTS, 2)
    assert all(one.experts is None for i in range(3) for one in plain.completions[i])


def edited(path: Path, edit: Any) -> None:
    lines = path.read_text().splitlines()
    line = json.loads(lines[1])
    edit(line)
    lines[1] = json.dumps(line)
    path.write_text("\n".join(lines) + "\n")


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda line: line.pop("experts"), "line 2 has no experts"),
        (lambda line: line.update(experts=7), "line 2 has the experts 7"),
        (lambda line: line["experts"].update(offset=-1), "line 2 has the experts"),
        (lambda line: line["experts"].update(shape=[1, 3, 2]), "line 2 has the experts"),
        (lambda line: line["experts"].update(offset=10**6), "does not have the experts of"),
    ],
)
def test_a_file_without_the_experts_of_a_line_is_refused_with_a_fix(recorded: Path, edit: Any, words: str) -> None:
    edited(recorded, edit)
    with pytest.raises(InputError, match=words) as caught:
        dump.read(recorded, [], PROMPTS, 2, routing=FORMAT)
    assert "model.router_replay=off" in str(caught.value)


def test_experts_that_the_model_does_not_have_are_refused(recorded: Path) -> None:
    experts = dump.experts_path(recorded)
    experts.write_bytes(bytes([99]) + experts.read_bytes()[1:])
    with pytest.raises(InputError, match="an expert that is none of 8"):
        dump.read(recorded, [], PROMPTS, 2, routing=FORMAT)
    experts.unlink()
    with pytest.raises(InputError, match="does not have the experts of"):
        dump.read(recorded, [], PROMPTS, 2, routing=FORMAT)


# The embedded engine


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("moe"), family="qwen3_moe", layers=LAYERS)


def engine_of(folder: Path) -> EmbeddedEngine:
    routing = RoutingFormat(LAYERS, PER_TOKEN, EXPERTS)
    engine = EmbeddedEngine(folder, torch.device("cpu"), torch.float32, 64, routing)
    engine.load_weights(Given(list(tensors(folder))), version=7)
    return engine


@torch.no_grad()
def of_a_pass(folder: Path, tokens: Sequence[int]) -> Tensor:
    """The choices of transformers' routers in a forward pass over a whole sequence: [tokens, layers, k], sorted."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    logits = model(torch.tensor([list(tokens)]), output_router_logits=True).router_logits
    return torch.stack([of.topk(PER_TOKEN).indices for of in logits], dim=1).sort(-1).values


ASKED = [Request(prompt, 3, i) for i, prompt in enumerate([(3, 14, 15), (9,), (2, 6, 5, 3, 5, 8)])]
DRAWN = Sampling(1.0, 40, with_experts=True)


def assert_of_a_pass(folder: Path, answers: dict[int, list[Completion]]) -> None:
    for i, rows in answers.items():
        for one in rows:
            tokens = [*ASKED[i].token_ids, *one.token_ids.tolist()]
            assert one.experts is not None
            assert one.experts.dtype == torch.uint8
            assert torch.equal(one.experts.long().sort(-1).values, of_a_pass(folder, tokens)[:-1])


def test_the_embedded_engines_experts_are_those_of_a_full_forward_pass(folder: Path) -> None:
    """With prompts of several lengths in a batch, and rows that leave it."""
    engine = engine_of(folder)
    answers = dict(engine.generate(ASKED, DRAWN))
    assert len({len(one.token_ids) for rows in answers.values() for one in rows}) > 1
    assert_of_a_pass(folder, answers)
    plain = dict(engine.generate(ASKED, dataclasses.replace(DRAWN, with_experts=False)))
    assert all(one.experts is None for rows in plain.values() for one in rows)


def test_a_paused_response_continues_with_its_experts(folder: Path) -> None:
    engine = engine_of(folder)
    requests = [dataclasses.replace(request, pause_after=16) for request in ASKED]
    for _ in range(3):
        answers = dict(engine.generate(requests, DRAWN))
        requests = [dataclasses.replace(one, begun=tuple(answers[i])) for i, one in enumerate(requests)]
    assert all(one.finish_reason != UNFINISHED for rows in answers.values() for one in rows)
    assert_of_a_pass(folder, answers)


@pytest.mark.parametrize("mode", RouterReplay)
@pytest.mark.parametrize("trains", [True, False])
def test_an_engine_returns_experts_where_a_training_may_use_them(
    folder: Path, mode: RouterReplay, trains: bool
) -> None:
    config = Config()
    config.model.path, config.model.router_replay, config.rollout.engine = str(folder), mode, EngineKind.sglang
    routing = server_adapter_of(config, cpu=True, trains=trains).routing
    assert routing == (RoutingFormat(LAYERS, PER_TOKEN, EXPERTS) if trains and mode is not RouterReplay.off else None)
    config.model.path = str(write_model(folder.parent / f"dense-{mode.name}-{trains}", layers=1))
    assert server_adapter_of(config, cpu=True, trains=trains).routing is None
