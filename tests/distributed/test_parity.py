"""Qwen3 on Megatron-Core against transformers' own model, in fp32, under every layout."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import transformers
from megatron.core.pipeline_parallel import get_forward_backward_func

from megatron_tempo.config.schema import Config
from megatron_tempo.models.actor import Actor
from megatron_tempo.models.packing import MicroBatch, micro_batches
from megatron_tempo.types import Batch
from megatron_tempo.weights.folder import tensors
from megatron_tempo.wiring import build_actor, build_critic, export_hf, open_workplace, weights_of
from tests.support.ranks import run_ranks
from tests.support.tiny import VOCAB, ragged_batch, write_model

LAYOUTS = {
    "tp1": (1, 1, False, 1),
    "tp2": (2, 1, False, 2),
    "tp2-sequence": (2, 1, True, 2),
    "pp2": (1, 2, False, 2),
    "tp2-pp2-sequence": (2, 2, True, 4),
}
PACKED, UNPACKED = 48, 1  # token budgets: with 1, every row is a micro-batch of its own


def config_of(model: Path, layout: tuple[int, int, bool, int]) -> Config:
    config = Config()
    config.model.path = str(model)
    config.parallel.tensor, config.parallel.pipeline, config.parallel.sequence, _ = layout
    return config


def gather_logits(actor: Actor, batch: Batch) -> torch.Tensor | None:
    """This tensor rank's logits of every token of every row, on the last stage: [tokens, padded vocabulary / tensor]."""
    model = actor.model
    parts = micro_batches(batch, torch.arange(len(batch)), model.layout, model.micro_batch_tokens, model.device)
    rows: dict[int, torch.Tensor] = {}

    def step(batches: Iterator[MicroBatch], module: torch.nn.Module) -> tuple[torch.Tensor, object]:
        micro = next(batches)

        def keep(logits: torch.Tensor) -> tuple[torch.Tensor, dict[str, float]]:
            at = 0
            for row, length in zip(micro.rows.tolist(), batch.lengths[micro.rows].tolist(), strict=True):
                rows[row] = logits[at : at + length].clone()
                at += length
            return logits.new_zeros(()), {}

        return module(micro), keep

    with torch.no_grad():
        get_forward_backward_func()(
            forward_step_func=step, data_iterator=iter(parts), model=[model.module],
            num_microbatches=len(parts), seq_length=1, micro_batch_size=1, forward_only=True,
        )  # fmt: skip
    return torch.cat([rows[i] for i in range(len(batch))]) if model.layout.is_last_stage else None


def measure(model: Path, layout: tuple[int, int, bool, int], out: Path) -> dict[str, object]:
    """Logits, log-probabilities and exported weights of one layout."""
    batch = ragged_batch(6)
    with open_workplace(config_of(model, layout)) as place:
        actor = build_actor(place)
        buckets = list(weights_of(actor.model, place))
        found: dict[str, object] = {
            "tensor_rank": place.layout.tensor_rank,
            "weights": {name: tensor for bucket in buckets for name, tensor in bucket},
        }
        export_hf(place, actor, build_critic(place), out / "exported")
        for budget in (PACKED, UNPACKED):
            actor.model.micro_batch_tokens = budget
            found[f"logits/{budget}"] = gather_logits(actor, batch)
            found[f"logprobs/{budget}"] = actor.logprobs(batch)
    return found


def reference_logits(model: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """transformers' logits of every token, row by row, and the log-probabilities of the responses."""
    batch = ragged_batch(6)
    reference = transformers.AutoModelForCausalLM.from_pretrained(model, attn_implementation="eager")
    logits, logprobs = [], []
    with torch.no_grad():
        for prompt, response in zip(batch.prompts(), batch.responses(), strict=True):
            row = reference(torch.cat([prompt, response])[None]).logits[0]
            logits.append(row)
            logprobs.append(row.log_softmax(-1)[len(prompt) - 1 : -1].gather(1, response[:, None])[:, 0])
    return torch.cat(logits), torch.cat(logprobs)


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"), tied=request.param)


@pytest.mark.parametrize("name", LAYOUTS)
def test_logits_weights_and_export_agree_with_transformers(model: Path, name: str, tmp_path: Path) -> None:
    layout = LAYOUTS[name]
    logits, logprobs = reference_logits(model)
    ranks = run_ranks(measure, layout[3], tmp_path, model, layout, tmp_path)
    for budget in (PACKED, UNPACKED):
        shards = [r[f"logits/{budget}"] for r in sorted(ranks, key=lambda r: r["tensor_rank"])]
        whole = torch.cat([shard for shard in shards if shard is not None], dim=1)[:, :VOCAB]
        assert (whole - logits).abs().max() < 1e-4 * logits.abs().max()
        for rank in ranks:
            torch.testing.assert_close(rank[f"logprobs/{budget}"], logprobs, atol=1e-4, rtol=1e-4)

    original = {name: tensor for bucket in tensors(model) for name, tensor in bucket}
    for weights in [rank["weights"] for rank in ranks] + [
        {name: tensor for bucket in tensors(tmp_path / "exported/actor") for name, tensor in bucket}
    ]:
        assert weights.keys() == original.keys()
        assert all(torch.equal(weights[name], original[name]) for name in original)

    reopened = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "exported/actor")
    tokens = torch.arange(10)[None]
    first = transformers.AutoModelForCausalLM.from_pretrained(model)
    assert torch.equal(reopened(tokens).logits, first(tokens).logits)
    critic = transformers.AutoModelForTokenClassification.from_pretrained(tmp_path / "exported/critic")
    assert critic(tokens).logits.abs().max() == 0  # an untrained value head
