"""A mixture of experts in every layout, against transformers' Qwen3-MoE: outputs, routers' reports, one optimizer step.

The reference of the step is transformers' gradient in fp32 and Adam in float64. The updated weights are compared by the
outputs that they give, which read all of them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_tempo.config.choices import Recompute
from megatron_tempo.config.schema import Config, CriticLayoutConfig, ParallelConfig
from megatron_tempo.config.updates import OptimizerConfig
from megatron_tempo.models.packing import MicroBatch
from megatron_tempo.models.trained import Step, TrainedModel
from megatron_tempo.training.context import open_context
from megatron_tempo.training.setup import build_actor, build_critic
from megatron_tempo.types import Batch
from tests.support.group_reads import refuse_group_reads
from tests.support.matrix import matrix
from tests.support.ranks import run_ranks
from tests.support.tiny import EXPERTS, PER_TOKEN, ragged_batch, write_model

LAYERS, ROWS, COEF = 4, 6, 0.5
ADAM = OptimizerConfig(lr=0.05, warmup_steps=0, eps=0.05, weight_decay=0.1, clip_grad=1e9)
# name: processes, layout, model
LAYOUTS: dict[str, tuple[int, ParallelConfig, str]] = {
    "one": (1, ParallelConfig(), "normalised"),
    "one-not-normalised-small-budget": (1, ParallelConfig(micro_batch_tokens=48), "raw"),
    "ep2-small-budget": (4, ParallelConfig(expert=2, micro_batch_tokens=48, recompute=Recompute.layers), "normalised"),
    "tp2-ep2": (2, ParallelConfig(tensor=2, sequence=True, expert=2, expert_tensor=1), "normalised"),
    "tp2": (2, ParallelConfig(tensor=2, sequence=True, recompute=Recompute.attention), "normalised"),
    "tp2-etp1-critic-ep2": (
        2,
        ParallelConfig(
            tensor=2, sequence=True, expert_tensor=1, critic=CriticLayoutConfig(tensor=1, sequence=False, expert=2)
        ),
        "normalised",
    ),
    "ep4-offload": (4, ParallelConfig(expert=4, offload=True, ddp_bucket_size=1000), "normalised"),
    "cp2-ep2-pp2": (4, ParallelConfig(context=2, expert=2, pipeline=2, virtual_pipeline=2), "normalised"),
    "tp2-ep2-etp2": (4, ParallelConfig(tensor=2, sequence=True, expert=2, micro_batch_tokens=60), "normalised"),
    "dp2-etp2": (4, ParallelConfig(expert_tensor=2, overlap_param_gather=False), "normalised"),
    "idle-rank-ep4": (4, ParallelConfig(expert=4, micro_batch_tokens=60), "idle"),
}
FEW = ["one-not-normalised-small-budget", "ep2-small-budget", "tp2-etp1-critic-ep2", "ep4-offload", "cp2-ep2-pp2"]
FEW += ["tp2-ep2-etp2", "idle-rank-ep4"]


def config_of(model: Path, parallel: ParallelConfig, coef: float = 0.0) -> Config:
    config = Config()
    config.model.path, config.model.router_aux_loss_coef, config.parallel = str(model), coef, parallel
    return config


def measured_step(model: TrainedModel, batch: Batch, owners: Tensor) -> Step:
    """A step on minus the mean output of each row."""

    def loss(micro: MicroBatch, output: Tensor) -> tuple[Tensor, Tensor]:
        rows = micro.response_rows if output.dim() == 2 else micro.value_rows
        numbers = output[0] if output.dim() == 2 else output
        means = torch.stack([one.mean() for one in numbers.split(rows.lengths.tolist())]) if len(micro.rows) else None
        by_row = numbers.new_zeros(0) if means is None else -means
        return by_row, by_row.detach()[:, None]

    return model.step(batch, torch.arange(ROWS), owners, loss, 1, ADAM)


def kept(model: TrainedModel) -> dict[str, int]:
    """Elements of the tensors that the dispatchers of a model hold, other than their orders of experts."""
    dispatchers = [module.token_dispatcher for module in model.net.modules() if hasattr(module, "token_dispatcher")]
    assert len(dispatchers) == LAYERS
    tensors = {name: one for each in dispatchers for name, one in vars(each).items() if isinstance(one, Tensor)}
    return {name: one.numel() for name, one in tensors.items() if one.numel() > EXPERTS}


def measured(model: Path, parallel: ParallelConfig, coef: float = 0.0) -> dict[str, Any]:
    refuse_group_reads()
    with open_context(config_of(model, parallel, coef)) as context:
        batch, found = ragged_batch(ROWS), {}
        actor, critic = build_actor(context), build_critic(context)
        with critic.model.at_work():
            for chunk in critic.model.net.chunks:
                if chunk.post_process:
                    chunk.output_layer.weight.data.copy_(head())
        critic.model.optimizer.reload_model_params()
        for name, one, read in (("actor", actor, actor.logprobs), ("critic", critic, critic.values)):
            owners = one.owners(batch)
            before, step = gathered(read(batch)), measured_step(one.model, batch, owners)
            assert step.made
            assert step.routing is not None
            found[name] = {
                "before": before,
                "grad_norm": step.grad_norm,
                "sums": step.routing.sums,
                "metrics": step.routing.metrics(),
                "after": gathered(read(batch)),
                "names": sorted(one.model.net.names_in_checkpoints().values()),
            }
            if parallel.offload:
                assert kept(one.model)
                context.offloader.offload_all()
                assert not kept(one.model)
        return found


def gathered(numbers: Tensor) -> Tensor:
    """The numbers of all ranks: each row has one owner, whose copies agree."""
    table = torch.stack([torch.empty_like(numbers) for _ in range(torch.distributed.get_world_size())])
    torch.distributed.all_gather(list(table.unbind()), numbers)
    return table.gather(0, table.abs().argmax(0, keepdim=True))[0]


def head() -> Tensor:
    return torch.linspace(-0.5, 0.5, 32)[None]


class Reference:
    """transformers' model, and what it computes of a batch."""

    def __init__(self, model: Path, *, critic: bool, coef: float) -> None:
        kind = transformers.AutoModelForTokenClassification if critic else transformers.AutoModelForCausalLM
        more = {"num_labels": 1} if critic else {}
        self.network = kind.from_pretrained(model, attn_implementation="eager", **more)
        self.critic, self.coef, self.batch = critic, coef, ragged_batch(ROWS)
        if critic:
            self.network.score.weight.data.copy_(head())
            self.network.score.bias.data.zero_()

    def outputs(self) -> tuple[list[Tensor], list[list[Tensor]]]:
        """Of each row: log-probabilities or values, and the logits of each layer's router."""
        found, routers = [], []
        hooks: list[Tensor] = []
        for layer in self.network.model.layers:
            layer.mlp.gate.register_forward_hook(lambda _module, _given, out: hooks.append(out[0]))
        for prompt, response in zip(self.batch.prompts(), self.batch.responses(), strict=True):
            hooks.clear()
            logits = self.network(torch.cat([prompt, response])[None].long()).logits[0]
            routers.append(list(hooks[:LAYERS]))
            if self.critic:
                found.append(logits[len(prompt) - 1 :, 0])
            else:
                logs = logits[len(prompt) - 1 : -1].log_softmax(-1)
                found.append(logs.gather(1, response.long()[:, None])[:, 0])
        for layer in self.network.model.layers:
            layer.mlp.gate._forward_hooks.clear()
        return found, routers

    def reports(self, routers: list[list[Tensor]]) -> tuple[Tensor, Tensor]:
        """The sums of the routers' reports in float64, [layers, 2 experts + 1], and the auxiliary losses of layers."""
        sums, losses = [], []
        for layer in range(LAYERS):
            probs = torch.cat([row[layer] for row in routers]).double().softmax(-1)
            load = (
                torch.zeros(EXPERTS)
                .double()
                .index_add(0, probs.topk(PER_TOKEN).indices.flatten(), torch.ones(probs.shape[0] * PER_TOKEN).double())
            )
            entropy = -(probs * probs.log()).sum()
            sums.append(torch.cat([load, probs.sum(0), entropy[None]]))
            # f_e: share of the choices, P_e: mean probability; E * sum f_e P_e
            losses.append(EXPERTS * ((load / load.sum()) * probs.mean(0)).sum())
        return torch.stack(sums).detach(), torch.stack(losses)

    def step(self) -> dict[str, Any]:
        """Adam's first step in float64 on the mean over rows of minus the mean output."""
        outputs, routers = self.outputs()
        sums, losses = self.reports(routers)
        loss = -torch.stack([one.mean() for one in outputs]).mean() + self.coef * losses.sum()
        loss.backward()
        parameters = [one for one in self.network.parameters() if one.grad is not None]
        norm = float(torch.stack([one.grad.double().norm() for one in parameters]).norm())
        for one in parameters:
            gradient, weight = one.grad.double(), one.data.double()
            decay = ADAM.weight_decay if one.dim() > 1 else 0.0
            one.data.copy_(weight - ADAM.lr * (gradient / (gradient.abs() + ADAM.eps) + decay * weight))
        with torch.no_grad():
            after = torch.cat(self.outputs()[0])
        before = torch.cat(outputs).detach()
        return {"before": before, "grad_norm": norm, "sums": sums, "after": after, "losses": losses.detach()}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    out = tmp_path_factory.mktemp("models")
    folders = {
        name: write_model(out / name, family="qwen3_moe", layers=LAYERS, normalized=name == "normalised")
        for name in ("normalised", "raw", "idle")
    }
    leave_idle(folders["idle"] / "model.safetensors")
    return folders


def leave_idle(file: Path) -> None:
    """Let no token choose the last two experts: three experts have the opposite logits of three others, so three are
    positive, and the last two are 0."""
    tensors = load_file(file)
    for name in (name for name in tensors if name.endswith("mlp.gate.weight")):
        half = tensors[name][:3]
        tensors[name] = torch.cat([half, -half, torch.zeros(2, half.shape[1])])
    save_file(tensors, file, {"format": "pt"})


@pytest.fixture(scope="module")
def references(models: dict[str, Path]) -> dict[str, dict[str, dict[str, Any]]]:
    kinds = {"actor": False, "critic": True}
    return {
        model: {name: Reference(folder, critic=critic, coef=0.0).step() for name, critic in kinds.items()}
        for model, folder in models.items()
    }


def assert_close(found: Tensor, wanted: Tensor, what: str) -> None:
    assert (found.double() - wanted.double()).abs().max() <= 1e-4 * wanted.abs().max(), what


def assert_step(found: dict[str, Any], wanted: dict[str, Any]) -> None:
    assert_close(found["before"], wanted["before"], "outputs")
    assert torch.equal(found["sums"][:, :EXPERTS].double(), wanted["sums"][:, :EXPERTS]), "the experts chosen"
    assert_close(found["sums"], wanted["sums"], "the routers' reports")
    assert found["grad_norm"] == pytest.approx(wanted["grad_norm"], rel=1e-4)
    assert (wanted["after"] - wanted["before"]).abs().max() > 0.1, "the step matters"
    assert_close(found["after"], wanted["after"], "outputs of the updated weights")
    assert found["metrics"]["router_dropped"] == 0.0
    assert found["metrics"]["router_aux_loss"] == pytest.approx(float(wanted["losses"].mean()), rel=1e-5)


@pytest.mark.parametrize("name", matrix(LAYOUTS, FEW))
def test_outputs_routers_and_a_step_are_transformers_own(
    models: dict[str, Path], references: dict[str, Any], tmp_path: Path, name: str
) -> None:
    world, parallel, kind = LAYOUTS[name]
    for rank in run_ranks(measured, world, tmp_path, models[kind], parallel):
        for model, wanted in references[kind].items():
            assert_step(rank[model], wanted)
            assert rank[model]["metrics"]["router_unused_experts"] == (2 / EXPERTS if kind == "idle" else 0)


@pytest.mark.parametrize("name", matrix(["one", "tp2-ep2", "cp2-ep2-pp2"], ["tp2-ep2"]))
def test_the_auxiliary_loss_has_the_gradient_of_its_formula(models: dict[str, Path], tmp_path: Path, name: str) -> None:
    """All rows are one micro-batch in these layouts, so its mean over micro-batches is the formula."""
    world, parallel, _ = LAYOUTS[name]
    wanted = Reference(models["normalised"], critic=False, coef=COEF).step()
    for rank in run_ranks(measured, world, tmp_path, models["normalised"], parallel, COEF):
        assert_step(rank["actor"], wanted)
