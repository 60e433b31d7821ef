"""The embedded engine against transformers' own forward pass over the whole sequence."""

from __future__ import annotations

import warnings
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor

from megatron_tempo.errors import EngineError
from megatron_tempo.rollout.embedded import ENDED_SHARE, EmbeddedEngine
from megatron_tempo.rollout.engine import Request, Sampling
from megatron_tempo.types import Completion, seed_of
from tests.support.completions import plains
from tests.support.tiny import VOCAB, WORDS, write_model
from tests.support.weights import Given, tensors

CPU = torch.device("cpu")
END = WORDS.index("$")
PROMPTS = [(3, 14, 15), (9,), (2, 6, 5, 3, 5, 8, 9, 7, 9), (31, 41), (59, 26, 53, 58, 9)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"), tied=False, layers=2)


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("tied"), tied=True, layers=1)


@pytest.fixture(scope="module")
def olmo3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("olmo3"), family="olmo3", layers=3)


def model_of(folder: Path, dtype: torch.dtype = torch.float32) -> transformers.PreTrainedModel:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager").eval()


def weights_of(folder: Path) -> dict[str, Tensor]:
    return {name: parameter.detach() for name, parameter in model_of(folder).named_parameters()}


def engine_of(folder: Path, *, batch_rows: int = 64, dtype: torch.dtype = torch.float32) -> EmbeddedEngine:
    engine = EmbeddedEngine(folder, CPU, dtype, batch_rows)
    engine.load_weights(Given([[item] for item in weights_of(folder).items()]), version=7)
    return engine


def requests_of(prompts: list[tuple[int, ...]], samples: int = 3) -> list[Request]:
    return [Request(prompt, samples, seed_of("test", prompt)) for prompt in prompts]


def generate(engine: EmbeddedEngine, requests: list[Request], sampling: Sampling) -> list[list[Completion]]:
    """The completions of each request, in order."""
    answers = dict(engine.generate(requests, sampling))
    return [answers[i] for i in range(len(requests))]


def flat(answers: list[list[Completion]]) -> list[Completion]:
    return [completion for row in answers for completion in row]


def same(actual: list[list[Completion]], wanted: list[list[Completion]]) -> None:
    for mine, theirs in zip(flat(actual), flat(wanted), strict=True):
        assert mine.token_ids.tolist() == theirs.token_ids.tolist()
        assert mine.finish_reason == theirs.finish_reason
        assert mine.logprobs.tolist() == pytest.approx(theirs.logprobs.tolist(), abs=1e-5)


# What a completion says


@pytest.mark.parametrize(("kind", "temperature"), [("folder", 1.0), ("folder", 0.6), ("folder", 1.7), ("olmo3", 0.6)])
@torch.no_grad()
def test_logprobs_are_those_of_a_full_forward_pass(
    request: pytest.FixtureRequest, kind: str, temperature: float
) -> None:
    """With windows too, which are shorter than a prompt or become so while tokens are drawn."""
    folder = request.getfixturevalue(kind)
    model = model_of(folder)
    answers = generate(engine_of(folder), requests_of(PROMPTS), Sampling(temperature, 24))
    assert [len(row) for row in answers] == [3] * len(PROMPTS)
    for prompt, row in zip(PROMPTS, answers, strict=True):
        for completion in row:
            ids = completion.token_ids.long()
            logits = model(torch.tensor([[*prompt, *completion.token_ids]])).logits[0, len(prompt) - 1 : -1]
            wanted = (logits / temperature).log_softmax(1).gather(1, ids[:, None])[:, 0]
            assert completion.logprobs.tolist() == pytest.approx(wanted.tolist(), abs=1e-5)
            assert completion.versions == ((7, len(completion.token_ids)),)


def test_an_end_token_stops_a_response_and_is_part_of_it(folder: Path) -> None:
    answers = generate(engine_of(folder), requests_of(PROMPTS, samples=16), Sampling(3.0, 40))
    reasons = Counter(completion.finish_reason for completion in flat(answers))
    assert min(reasons["stop"], reasons["length"]) > 5, "the case has both"
    for completion in flat(answers):
        assert len(completion.logprobs) == len(completion.token_ids)
        assert END not in completion.token_ids[:-1]
        assert (completion.finish_reason == "stop") == (completion.token_ids[-1] == END)
        assert completion.finish_reason == "stop" or len(completion.token_ids) == 40


def test_a_response_may_end_with_its_last_token(folder: Path) -> None:
    answers = generate(engine_of(folder), requests_of(PROMPTS, samples=100), Sampling(3.0, 1))
    ended = [completion for completion in flat(answers) if completion.token_ids.tolist() == [END]]
    assert ended
    for completion in flat(answers):
        assert len(completion.token_ids) == 1
        assert completion.finish_reason == ("stop" if completion in ended else "length")


# What a completion depends on


def test_a_prompt_is_answered_alike_in_any_company(folder: Path) -> None:
    """Beside longer and shorter prompts, in batches of any size, and in any order: the seed alone decides."""
    sampling, requests = Sampling(2.0, 20), requests_of(PROMPTS, samples=3)
    engine = engine_of(folder, dtype=torch.float64)
    alone = [generate(engine, [request], sampling)[0] for request in requests]
    for batch_rows in (1, 7, 64):
        engine = engine_of(folder, batch_rows=batch_rows, dtype=torch.float64)
        same(generate(engine, requests, sampling), alone)
        same(generate(engine, requests[::-1], sampling), alone[::-1])


def test_seeds_and_samples_differ_and_equal_seeds_agree(folder: Path) -> None:
    engine, sampling = engine_of(folder), Sampling(1.0, 12)
    (first,), (again,), (other,) = (generate(engine, [Request((3, 4), 8, seed)], sampling) for seed in (5, 5, 6))
    assert plains([first]) == plains([again])
    texts, others = ({tuple(one.token_ids.tolist()) for one in answers} for answers in (first, other))
    assert texts.isdisjoint(others)
    assert len(texts) == 8


def test_no_requests_give_no_answers(folder: Path) -> None:
    assert generate(engine_of(folder), [], Sampling(1.0, 4)) == []


def test_seeds_follow_from_their_parts_alone() -> None:
    seeds = [seed_of(*parts) for parts in [(1, "a", 2), (1, "a", 3), (1, "b", 2), (11, "a", 2)]]
    assert len(set(seeds)) == 4
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert seeds[0] == seed_of(1, "a", 2) == seed_of("1", "a", "2")


# The distribution


def chi_square(counts: Tensor, probabilities: Tensor) -> float:
    """In standard deviations from what samples of `probabilities` give; rare tokens count as one."""
    wanted = probabilities.double() * counts.sum()
    rare = wanted < 5
    observed = counts[~rare].double()
    if rare.any():
        observed = torch.cat([observed, counts[rare].sum()[None]])
        wanted = torch.cat([wanted[~rare], wanted[rare].sum()[None]])
    freedom = len(wanted) - 1
    statistic = float(((observed - wanted).square() / wanted).sum())
    return (statistic - freedom) / (2 * freedom) ** 0.5


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.6])
@torch.no_grad()
def test_tokens_follow_the_softmax_at_the_temperature(folder: Path, temperature: float) -> None:
    prompt = (3, 14, 15)
    (answers,) = generate(engine_of(folder), [Request(prompt, 20_000, 11)], Sampling(temperature, 2))
    model = model_of(folder)

    def probabilities(tokens: tuple[int, ...], at: float) -> Tensor:
        return (model(torch.tensor([tokens])).logits[0, -1] / at).softmax(0)

    firsts = torch.stack([answer.token_ids[0] for answer in answers]).bincount(minlength=VOCAB)
    assert abs(chi_square(firsts, probabilities(prompt, temperature))) < 4
    assert chi_square(firsts, probabilities(prompt, temperature * 1.2)) > 10, "a wrong temperature would be seen"

    # The second token, behind the commonest first one: its randomness is its own.
    common = int(firsts.argmax())
    assert common != END
    seconds = torch.stack([a.token_ids[1] for a in answers if a.token_ids[0] == common]).bincount(minlength=VOCAB)
    assert seconds.sum() > 500
    assert abs(chi_square(seconds, probabilities((*prompt, common), temperature))) < 4


# The cost


def test_rows_that_have_ended_leave_the_batch(folder: Path) -> None:
    engine = engine_of(folder, batch_rows=256)
    prompts = [prompt for prompt in PROMPTS if len(prompt) == 2] * 8
    answers = generate(engine, [Request(p, 32, i) for i, p in enumerate(prompts)], Sampling(3.0, 60))
    lengths = [len(completion.token_ids) for completion in flat(answers)]
    assert max(lengths) > 3 * min(lengths)
    count = engine.counted
    # Each prompt goes through the model once for all its samples; of a response, all but the last token.
    assert count.tokens - count.padding == sum(map(len, prompts)) + sum(lengths) - len(lengths)
    assert 0 < count.padding < ENDED_SHARE * count.tokens
    assert count.padding < 0.05 * count.tokens


def test_padding_before_short_prompts_is_counted(folder: Path) -> None:
    engine = engine_of(folder)
    generate(engine, requests_of(PROMPTS, samples=1), Sampling(1.0, 1))
    assert engine.counted.tokens == len(PROMPTS) * 9
    assert engine.counted.padding == len(PROMPTS) * 9 - sum(map(len, PROMPTS))


# Weights


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model.norm.weight": None}, "left out 1 tensors: model.norm.weight"),
        ({"model.norm.weight": torch.ones(31)}, r"model.norm.weight of shape \(31,\).*shape \(32,\)"),
        ({"model.norm.bias": torch.ones(32)}, r"model.norm.bias of shape \(32,\).*no such tensor"),
    ],
)
def test_weights_that_do_not_fit_are_refused(folder: Path, change: dict[str, Tensor | None], message: str) -> None:
    weights = weights_of(folder) | change
    bucket = [(name, tensor) for name, tensor in weights.items() if tensor is not None]
    with pytest.raises(ValueError, match=message):
        EmbeddedEngine(folder, CPU, torch.float32, 4).load_weights(Given([bucket]), 0)


def test_new_weights_are_used_and_named(folder: Path) -> None:
    engine, sampling = engine_of(folder), Sampling(1.0, 6)
    before = generate(engine, requests_of(PROMPTS), sampling)
    engine.load_weights(Given([[(n, t * 1.1) for n, t in weights_of(folder).items()]]), version=8)
    after = generate(engine, requests_of(PROMPTS), sampling)
    assert {version for completion in flat(after) for version, _ in completion.versions} == {8}
    assert [c.logprobs.tolist() for c in flat(after)] != [c.logprobs.tolist() for c in flat(before)]


def test_experts_arrive_by_their_published_names(tmp_path: Path) -> None:
    """A tensor for each expert and projection, where transformers holds one for all experts of a layer."""
    folder = write_model(tmp_path / "model", family="qwen3_moe", layers=2)
    published, model = list(tensors(folder)), model_of(folder)
    assert any(".experts.7.gate_proj." in name for bucket in published for name, _ in bucket)
    engine = EmbeddedEngine(folder, CPU, torch.float32, 64)
    engine.load_weights(Given(published), version=0)
    held = dict(engine._model.named_parameters())
    assert all(torch.equal(held[name], parameter) for name, parameter in model.named_parameters())
    assert engine.differences(Given(published)) == []
    name = "model.layers.1.mlp.experts.6.up_proj.weight"
    one = {name: tensor for bucket in published for name, tensor in bucket}[name]
    assert [found for found, _ in engine.differences(Given([[(name, one + 1)]]))] == [name]
    part = [item for item in published[0] if item[0] != name]
    with pytest.raises(ValueError, match=f"left out 1 tensors: {name}"):
        engine.load_weights(Given([part]), version=1)


def test_a_tied_model_takes_its_weights_with_or_without_the_repeated_output_matrix(tied: Path) -> None:
    """Published folders of tied models may hold lm_head.weight as well."""
    weights = weights_of(tied)
    assert "lm_head.weight" not in weights
    repeated = ("lm_head.weight", weights["model.embed_tokens.weight"])
    sampling = Sampling(1.0, 6)
    wanted = generate(engine_of(tied), requests_of(PROMPTS), sampling)
    engine = EmbeddedEngine(tied, CPU, torch.float32, 64)
    engine.load_weights(Given([[repeated, *weights.items()]]), 7)
    assert plains(generate(engine, requests_of(PROMPTS), sampling)) == plains(wanted)
    without = [item for item in weights.items() if item[0] != "model.embed_tokens.weight"]
    with pytest.raises(ValueError, match=r"left out 1 tensors: model.embed_tokens.weight"):
        engine.load_weights(Given([[repeated, *without]]), 7)


def test_tensors_that_are_not_the_given_ones_are_named_the_worst_first(folder: Path) -> None:
    engine, weights = engine_of(folder), weights_of(folder)
    assert engine.differences(Given([list(weights.items())])) == []
    names = list(weights)
    for name, factor in ((names[2], 1.25), (names[5], 0.5)):
        weights[name] = weights[name] * factor
    worst, second = engine.differences(Given([list(weights.items())]))
    assert worst == (names[5], pytest.approx(1.0))
    assert second == (names[2], pytest.approx(0.2))


@pytest.mark.parametrize("kind", ["folder", "olmo3"])
def test_no_warning_of_transformers(kind: str, request: pytest.FixtureRequest) -> None:
    """Such as that an argument has been renamed and the old name goes: it would be printed for each call."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        engine = engine_of(request.getfixturevalue(kind))
        generate(engine, requests_of(PROMPTS[:2]), Sampling(1.0, 4))


def test_an_older_transformers_gets_the_older_name_of_the_cache(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The keys and values go by the name that the model's `forward` has."""
    wanted = generate(engine_of(folder), requests_of(PROMPTS), Sampling(1.0, 4))
    kind = type(model_of(folder))
    newer = kind.forward

    def forward(self: torch.nn.Module, past_key_values: object = None, **arguments: object) -> object:
        return newer(self, cache=past_key_values, **arguments)

    monkeypatch.setattr(kind, "forward", forward)
    same(generate(engine_of(folder), requests_of(PROMPTS), Sampling(1.0, 4)), wanted)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_logits_that_are_not_finite_end_the_generation(folder: Path, value: float) -> None:
    """Weights that overflow in the pass, not in the file: the tokens would be noise."""
    weights = weights_of(folder)
    weights["model.norm.weight"] = weights["model.norm.weight"] * value
    engine = EmbeddedEngine(folder, CPU, torch.float32, 64)
    engine.load_weights(Given([[item] for item in weights.items()]), version=0)
    with pytest.raises(EngineError, match="the engine's logits are not finite"):
        generate(engine, requests_of(PROMPTS), Sampling(1.0, 4))


# Responses that continue


def test_a_response_that_is_paused_goes_on_as_if_it_had_not_been(folder: Path) -> None:
    """Tokens, log-probabilities and ends are those of a generation in one piece; versions are those of the weights."""
    engine, requests, sampling = engine_of(folder), requests_of(PROMPTS), Sampling(1.3, 12)
    whole = generate(engine, requests, sampling)
    begun: list[tuple[Completion, ...]] = [()] * len(requests)
    phases = 0
    while not begun[0] or any(one.finish_reason == "unfinished" for one in flat([list(of) for of in begun])):
        engine._version = 7 + phases
        now = [replace(one, begun=of, pause_after=5) for one, of in zip(requests, begun, strict=True)]
        begun = [tuple(of) for of in generate(engine, now, sampling)]
        phases += 1
        assert max(len(one.token_ids) for of in begun for one in of) <= 5 * phases
    assert phases == 3
    same([list(of) for of in begun], whole)
    for one in flat([list(of) for of in begun]):
        tokens = len(one.token_ids)
        parts = [min(5, tokens - 5 * phase) for phase in range(phases) if tokens > 5 * phase]
        assert one.versions == tuple((7 + phase, part) for phase, part in enumerate(parts))
