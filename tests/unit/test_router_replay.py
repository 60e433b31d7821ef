"""Router replay: what a router does with a recorded choice, and which choice each token of a micro-batch gets."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core.transformer.moe.moe_utils import topk_routing_with_score_function
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from megatron_tempo.models.packing import MicroBatch, micro_batches
from megatron_tempo.models.parallel import Layout
from megatron_tempo.models.router_replay import LayerChoice, ReplayedRouters
from megatron_tempo.types import Batch, picked
from tests.support.tiny import held_by, ragged_batch

CPU = torch.device("cpu")
TOKENS, EXPERTS, K = 7, 6, 2
UNKNOWN = [255] * K


def routers(*, replays: bool = True, counts: bool = False) -> Any:
    return SimpleNamespace(replays=replays, is_counting=counts, counts=torch.zeros(2, dtype=torch.int64))


def routed(logits: Tensor, choice: LayerChoice, *, pre_softmax: bool = False) -> tuple[Tensor, Tensor]:
    """Megatron's own probabilities and map of a router that asks `choice`."""
    return topk_routing_with_score_function(
        logits, K, use_pre_softmax=pre_softmax, score_function="softmax", router_replay=choice
    )


def choice_of(given: Tensor | None, of: Any) -> LayerChoice:
    choice = LayerChoice(of)
    choice.given = given
    return choice


GIVEN = torch.tensor([[4, 1], [0, 5], UNKNOWN, [3, 2], [1, 0], UNKNOWN, [2, 5]], dtype=torch.uint8)


@pytest.mark.parametrize("pre_softmax", [False, True])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16])
def test_a_replayed_token_goes_where_the_engine_sent_it(pre_softmax: bool, dtype: torch.dtype) -> None:
    """Its probabilities are those of the logits: by hand, with and without normalisation over the chosen experts."""
    logits = torch.randn(TOKENS, EXPERTS, generator=torch.Generator().manual_seed(0), requires_grad=True)
    given = GIVEN if dtype is torch.uint8 else GIVEN.short().masked_fill(GIVEN == 255, -1)
    probabilities, chosen = routed(logits, choice_of(given, routers()), pre_softmax=pre_softmax)
    own = logits.topk(K).indices
    wanted = torch.where((GIVEN == 255).all(1, keepdim=True), own, GIVEN.long())
    assert torch.equal(chosen.nonzero()[:, 1].view(TOKENS, K), wanted.sort(1).values)
    soft = logits.double().exp() * chosen
    soft = soft / (logits.double().exp() if pre_softmax else soft).sum(1, keepdim=True)
    torch.testing.assert_close(probabilities.double(), soft, atol=1e-6, rtol=0)
    weights = torch.rand(TOKENS, EXPERTS)
    (gradient,) = torch.autograd.grad((probabilities * weights).sum(), logits, retain_graph=True)
    (by_hand,) = torch.autograd.grad((soft * weights.double()).sum(), logits)
    torch.testing.assert_close(gradient, by_hand, atol=1e-6, rtol=0)
    assert gradient.abs().sum() > 0


def test_without_a_recorded_choice_the_router_chooses() -> None:
    logits = torch.randn(TOKENS, EXPERTS)
    for given, of in ((None, routers()), (GIVEN, routers(replays=False)), (torch.full_like(GIVEN, 255), routers())):
        plain = topk_routing_with_score_function(logits, K)
        for mine, wanted in zip(routed(logits, choice_of(given, of)), plain, strict=True):
            assert torch.equal(mine, wanted)


@pytest.mark.parametrize("replays", [False, True])
def test_agreement_is_of_sets_and_of_recorded_choices(replays: bool) -> None:
    """Of five recorded choices three are the router's, one of them in another order."""
    logits = torch.zeros(TOKENS, EXPERTS)
    for token, (first, second) in enumerate([(4, 1), (5, 0), (1, 2), (3, 2), (1, 3), (0, 1), (1, 5)]):
        logits[token, first], logits[token, second] = 2.0, 1.0
    of = routers(replays=replays, counts=True)
    routed(logits, choice_of(GIVEN, of))
    routed(logits, choice_of(None, of))
    assert of.counts.tolist() == [3, 5]


def test_choices_of_other_tokens_are_an_error() -> None:
    with pytest.raises(AssertionError, match="other tokens"):
        routed(torch.randn(TOKENS + 1, EXPERTS), choice_of(GIVEN, routers()))


# Which choice each token gets


def layout(tensor_rank: int, tensor: int, context_rank: int, context: int) -> Layout:
    return Layout(
        rank=0, world_size=1, tensor_rank=tensor_rank, tensor=tensor, pipeline_rank=0, pipeline=1, data_rank=0, data=1,
        context_rank=context_rank, context=context, sequence_parallel=tensor > 1,
    )  # fmt: skip


def numbered_batch() -> Batch:
    """Every token has another number, and so have its experts in each of three layers: number + 1000 * layer."""
    batch = ragged_batch(12)
    count = len(batch.prompt_tokens)
    prompts = torch.arange(count, dtype=torch.int32)
    responses = torch.arange(count, count + len(batch.response_tokens), dtype=torch.int32)
    batch = replace(batch, prompt_tokens=prompts, response_tokens=responses)
    numbers = torch.cat(list(batch.rows())).short()
    return replace(batch, experts=torch.stack([numbers + 1000 * layer for layer in range(3)], 1)[:, :, None])


def packed(batch: Batch, at: Layout, rows: Tensor) -> list[MicroBatch]:
    return micro_batches(batch, rows, at, 60, CPU, with_choices=True)


@pytest.mark.parametrize(("tensor", "context"), [(1, 1), (2, 1), (1, 2), (2, 2), (4, 3)])
@pytest.mark.parametrize("is_part", [False, True])
def test_each_token_of_a_rank_gets_its_own_choice(tensor: int, context: int, is_part: bool) -> None:
    """Under sequence and context parallelism, in any order of the rows, where the rank holds all rows or some."""
    whole = numbered_batch()
    rows = torch.tensor([7, 2, 11, 4, 0, 9])
    batch = held_by(whole, rows.sort().values) if is_part else whole
    seen: list[int] = []
    for context_rank in range(context):
        for tensor_rank in range(tensor):
            for micro in packed(batch, layout(tensor_rank, tensor, context_rank, context), rows):
                assert micro.choices is not None
                of_layers = micro.choices.of_layers([2, 0])
                tokens = micro.tokens[0].chunk(tensor)[tensor_rank]
                is_padding = of_layers[:, 0, 0] == -1
                assert torch.equal(of_layers[~is_padding, 0, 0], tokens[~is_padding].short() + 2000)
                assert torch.equal(of_layers[~is_padding, 1, 0], tokens[~is_padding].short())
                assert (of_layers[is_padding] == -1).all()
                seen += tokens[~is_padding].tolist()
    wanted = picked(torch.cat(list(whole.rows())), whole.lengths, rows)
    assert sorted(seen) == sorted(wanted.tolist()), "each token once, and none of the padding"


def test_a_micro_batch_of_padding_has_no_choice() -> None:
    """Also on a rank that holds no row."""
    whole, none = numbered_batch(), torch.zeros(0, dtype=torch.int64)
    for batch in (whole, held_by(whole, none)):
        (micro,) = packed(batch, layout(1, 2, 0, 1), none)
        assert micro.choices is not None
        assert micro.choices.of_layers([0, 1]).tolist() == [[[-1], [-1]]]


def test_micro_batches_have_no_choices_unless_a_model_replays_them() -> None:
    """The critic packs the same batch."""
    batch, rows = numbered_batch(), torch.arange(12)
    assert all(micro.choices is None for micro in micro_batches(batch, rows, layout(0, 1, 0, 1), 60, CPU))
    plain = replace(batch, experts=None)
    assert all(micro.choices is None for micro in packed(plain, layout(0, 1, 0, 1), rows))


# The layers of a network


class Router(nn.Module):
    """Megatron's router, as far as replay goes. `asked`: what it replays in each call, by layer."""

    def __init__(self) -> None:
        super().__init__()
        self.router_replay: LayerChoice | None = None


class Layer(nn.Module):
    def __init__(self, number: int, calls: list[tuple[int, Any]]) -> None:
        super().__init__()
        self.layer_number, self.calls = number, calls
        self.config = SimpleNamespace(moe_router_fusion=False)
        self.mlp = nn.Module()
        self.mlp.router = Router()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, hidden: Tensor, packed_seq_params: Any) -> Tensor:
        replay = self.mlp.router.router_replay
        assert isinstance(replay, LayerChoice)
        self.calls.append((self.layer_number, None if replay.given is None else replay.given.tolist()))
        return hidden * self.weight


class Chunk(nn.Module):
    def __init__(self, numbers: list[int], calls: list[tuple[int, Any]]) -> None:
        super().__init__()
        self.decoder = nn.Module()
        self.decoder.layers = nn.ModuleList(Layer(number, calls) for number in numbers)


class Chunks(nn.Module):
    def __init__(self, *chunks: Chunk) -> None:
        super().__init__()
        self.of = nn.ModuleList(chunks)

    @property
    def chunks(self) -> list[Any]:
        return list(self.of)


def test_each_layer_gets_its_own_choice_again_when_it_is_recomputed() -> None:
    """Two chunks of a pipeline stage, with layers 1, 3 and 5, 6. Another micro-batch runs before the recomputation."""
    calls: list[tuple[int, Any]] = []
    net: Any = Chunks(Chunk([2, 4], calls), Chunk([6, 7], calls))
    replay = ReplayedRouters(net, replays=True)
    assert replay.layers == [1, 3, 5, 6]
    batch = ragged_batch(2)
    tokens = int(batch.lengths.sum())
    experts = torch.arange(tokens * 4).short().view(tokens, 4, 1)
    (micro,) = packed(replace(batch, experts=experts), layout(0, 1, 0, 1), torch.arange(2))
    given = [replay.given_to(micro, chunk) for chunk in range(2)]
    assert micro.packing.experts is None, "the caller's micro-batch is unchanged"

    def run(chunk: int, packing: Any) -> Tensor:
        hidden = torch.ones(1, requires_grad=True)
        for layer in net.chunks[chunk].decoder.layers:

            def again(x: Tensor, layer: Any = layer) -> Tensor:
                return layer(hidden=x, packed_seq_params=packing)  # type: ignore[no-any-return]

            hidden = checkpoint(again, hidden, use_reentrant=True)
        return hidden

    loss = run(1, given[1].packing)
    run(0, replace(given[0].packing, experts=None))
    forward = list(calls)
    calls.clear()
    loss.backward()
    order = picked(experts[:, 2:], batch.lengths, micro.rows)
    assert forward[:2] == [(6, order[:, 0].tolist()), (7, order[:, 1].tolist())]
    assert forward[2:] == [(2, None), (4, None)]
    assert calls == [forward[1], forward[0]], "the backward pass sees what the forward pass saw"
    replay.clear()
    assert all(layer.mlp.router.router_replay.given is None for c in net.chunks for layer in c.decoder.layers)


def test_a_pass_that_neither_replays_nor_counts_moves_no_choices() -> None:
    replay = ReplayedRouters(Chunks(Chunk([1], [])), replays=False)  # type: ignore[arg-type]
    batch = numbered_batch()
    micro = packed(batch, layout(0, 1, 0, 1), torch.arange(2))[0]
    assert replay.given_to(micro, 0) is micro
    with replay.counting():
        assert replay.given_to(micro, 0).packing.experts is not None
    with replay.counting(replays=True):
        assert replay.replays
    assert not replay.replays
    assert replay.given_to(micro, 0) is micro


def test_the_agreement_is_taken_once(single: None) -> None:
    replay = ReplayedRouters(Chunks(Chunk([1], [])), replays=True)  # type: ignore[arg-type]
    assert replay.take_agreement() is None
    replay.counts += torch.tensor([3, 4])
    assert (replay.take_agreement(), replay.take_agreement()) == (0.75, None)
