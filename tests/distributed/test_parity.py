"""Each family on Megatron-Core against transformers' own model, in fp32, under every layout."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import transformers
from megatron.core.pipeline_parallel import get_forward_backward_func

from megatron_tempo.config.choices import Layers, Logits
from megatron_tempo.config.schema import Config
from megatron_tempo.models.actor import Actor
from megatron_tempo.models.packing import MicroBatch, micro_batches
from megatron_tempo.training.context import RunContext, open_context
from megatron_tempo.training.setup import build_actor, build_critic
from megatron_tempo.types import Batch
from megatron_tempo.weights.export import export_hf, weights_of
from tests.support.matrix import matrix
from tests.support.ranks import run_ranks
from tests.support.tiny import VOCAB, ragged_batch, write_model
from tests.support.weights import tensors

LAYOUTS = {
    "tp1": (1, 1, False, 1),
    "tp2": (2, 1, False, 2),
    "tp2-sequence": (2, 1, True, 2),
    "pp2": (1, 2, False, 2),
    "tp2-pp2-sequence": (2, 2, True, 4),
}
PACKED, UNPACKED = 48, 1  # token budgets: with 1, every row is a micro-batch of its own


def config_of(model: Path, layout: tuple[int, int, bool, int], layers: Layers) -> Config:
    config = Config()
    config.model.path, config.model.layers = str(model), layers
    config.parallel.tensor, config.parallel.pipeline, config.parallel.sequence, _ = layout
    return config


def gather_logits(actor: Actor, batch: Batch, monkeypatch: pytest.MonkeyPatch) -> torch.Tensor | None:
    """The logits of this tensor rank for every token, row after row; None before the last stage.

    The network makes none as a rule: Megatron's own output layer takes the place of its head.
    """
    model = actor.model
    net = model.net

    def head(hidden: torch.Tensor, micro: MicroBatch) -> torch.Tensor:
        weight = net.shared_embedding_or_output_weight() if net.share_embeddings_and_output_weights else None
        return net.output_layer(hidden, weight=weight)[0].squeeze(1)

    monkeypatch.setattr(net, "head", head, raising=True)
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


def measure(context: RunContext, model: Path, out: Path) -> dict[str, object]:
    """Logits, log-probabilities and exported weights of one model in one layout."""
    batch = ragged_batch(6)
    context.config.model.path = str(model)
    actor = build_actor(context)
    buckets = list(weights_of(actor.model, context.config).everywhere())
    measured: dict[str, object] = {
        "tensor_rank": context.layouts.actor.tensor_rank,
        "weights": {name: tensor for bucket in buckets for name, tensor in bucket},
    }
    export_hf(context.config, actor, build_critic(context), out)
    for budget in (PACKED, UNPACKED):
        actor.model.micro_batch_tokens = budget
        for kind in Logits:
            actor.model.net.logits = kind
            measured[f"logprobs/{budget}/{kind.name}"] = actor.logprobs(batch)
        with pytest.MonkeyPatch.context() as monkeypatch:
            measured[f"logits/{budget}"] = gather_logits(actor, batch, monkeypatch)
    return measured


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


def measure_all(
    models: dict[str, Path], layout: tuple[int, int, bool, int], out: Path, layers: Layers
) -> dict[str, dict[str, object]]:
    """One process group can be opened in a process: the models take turns in it."""
    with open_context(config_of(models["tied"], layout, layers)) as context:
        return {name: measure(context, model, out / name) for name, model in models.items()}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    out = tmp_path_factory.mktemp("models")
    return {
        "tied": write_model(out / "tied", tied=True),
        "untied": write_model(out / "untied"),
        **{family: write_model(out / family, family=family) for family in ("llama", "olmo3", "qwen2")},
    }


@pytest.mark.parametrize("name", matrix(LAYOUTS, ["tp1", "pp2", "tp2-pp2-sequence"]))
def test_logits_weights_and_export_agree_with_transformers(models: dict[str, Path], name: str, tmp_path: Path) -> None:
    layout = LAYOUTS[name]
    by_rank = run_ranks(measure_all, layout[3], tmp_path / "ranks", models, layout, tmp_path, Layers.local)
    for kind, model in models.items():
        ranks = [measured[kind] for measured in by_rank]
        assert_logits(model, ranks)
        assert_weights(model, [rank["weights"] for rank in ranks], tmp_path / kind)


def assert_logits(model: Path, ranks: list[dict]) -> None:
    logits, logprobs = reference_logits(model)
    for budget in (PACKED, UNPACKED):
        shards = [rank[f"logits/{budget}"] for rank in sorted(ranks, key=lambda rank: rank["tensor_rank"])]
        whole = torch.cat([shard for shard in shards if shard is not None], dim=1)[:, :VOCAB]
        assert (whole - logits).abs().max() < 1e-4 * logits.abs().max()
        for rank in ranks:
            for kind in Logits:
                torch.testing.assert_close(rank[f"logprobs/{budget}/{kind.name}"], logprobs, atol=1e-4, rtol=1e-4)


def assert_weights(model: Path, streams: list[dict[str, torch.Tensor]], exported: Path) -> None:
    """What leaves the models is what came in, to the bit; transformers opens what was exported."""
    original = {name: tensor for bucket in tensors(model) for name, tensor in bucket}
    written = {name: tensor for bucket in tensors(exported / "actor") for name, tensor in bucket}
    for weights in [*streams, written]:
        assert weights.keys() == original.keys()
        assert all(torch.equal(weights[name], original[name]) for name in original)
    tokens = torch.arange(10)[None]
    reopened, first = (transformers.AutoModelForCausalLM.from_pretrained(p) for p in (exported / "actor", model))
    assert torch.equal(reopened(tokens).logits, first(tokens).logits)
    critic = transformers.AutoModelForTokenClassification.from_pretrained(exported / "critic")
    assert critic(tokens).logits.abs().max() == 0  # an untrained value head
