"""A Megatron model and its forward and backward passes: the common part of actor and critic."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, finalize_model_grads
from megatron.core.optimizer import MegatronOptimizer, get_megatron_optimizer
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from torch import Tensor

from megatron_tempo.config.pipeline_layers import micro_batch_group
from megatron_tempo.config.schema import ParallelConfig
from megatron_tempo.config.updates import OptimizerConfig
from megatron_tempo.models.chunks import ModelChunks, WrappedChunks
from megatron_tempo.models.ddp import WeightGather, ddp_config, reduces_at_last_micro_batch
from megatron_tempo.models.gpt import PackedGPT
from megatron_tempo.models.megatron_compat.dispatcher import drop_routes
from megatron_tempo.models.megatron_compat.optimizer import (
    init_adam_state,
    load_optimizer_state,
    note_param_order,
    optimizer_parts,
    without_bucket_padding,
)
from megatron_tempo.models.megatron_compat.transformer_engine import drop_fp8_weights
from megatron_tempo.models.offload import ModelOffloader
from megatron_tempo.models.packing import MicroBatch, divide_by_budget, micro_batches
from megatron_tempo.models.parallel import Layout, share_reported, sum_over_ranks
from megatron_tempo.models.router_replay import ReplayedRouters
from megatron_tempo.models.routing import RouterReport, layer_reports
from megatron_tempo.models.wrapping import as_one, nothing_saved, on_device
from megatron_tempo.runtime import progress_marker
from megatron_tempo.types import Batch, TokenCount

# Functions of a micro-batch, and of the model's output on the last stage; see `TrainedModel.step` and `Model.read`.
Loss = Callable[[MicroBatch, Tensor], tuple[Tensor, Tensor]]
Cells = Callable[[MicroBatch], Tensor]


@dataclass(frozen=True, slots=True)
class Step:
    """An optimizer step that was taken or skipped."""

    metrics: Tensor  # float32 [rows, num_metrics], the same on every rank
    losses: Tensor  # float32 [rows], the same on every rank
    grad_norm: float  # before clipping
    made: bool  # False if a loss or the gradient is not finite: the step was skipped, the weights are unchanged
    routing: RouterReport | None = None  # of a mixture of experts, the same on every rank


@dataclass(slots=True)
class Model:
    """A network under Megatron's 1F1B schedule. `net`: this rank's shard of the network, without wrappers."""

    net: PackedGPT | ModelChunks
    layout: Layout
    device: torch.device
    micro_batch_tokens: int
    module: Any  # the network with its wrappers, as it is called; `WrappedChunks` under virtual pipeline stages
    offloader: ModelOffloader  # shared by the models of a run
    counted: TokenCount = field(default_factory=TokenCount)
    replay: ReplayedRouters | None = None  # of an actor whose engine returns the experts that it chose
    fp8_scales_ready: int = 0  # delayed scaling: 1 if forward scales are known, 2 if backward scales are known too

    @classmethod
    def frozen(
        cls,
        net: PackedGPT | ModelChunks,
        layout: Layout,
        device: torch.device,
        micro_batch_tokens: int,
        offloader: ModelOffloader,
    ) -> Model:
        """A network without gradients and optimizer."""
        modules = [on_device(chunk, device).requires_grad_(False) for chunk in net.chunks]
        model = cls(net, layout, device, micro_batch_tokens, as_one(modules), offloader)
        offloader.load(model)
        return model

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """Load the model and make its process groups current. All access to its tensors happens inside the block."""
        self.load()
        with self.layout.groups.current():
            yield

    def load(self) -> None:
        """Load the model to the device, with all its weights up to date."""
        self.offloader.load(self)
        self.wait_for_weights()

    def load_weights(self) -> None:
        """Load what a weight sync reads: see `ModelOffloader`."""
        self.offloader.load_weights(self)
        self.wait_for_weights()

    def wait_for_weights(self) -> None:
        """Wait for weights that other replicas send. Not collective."""

    @contextmanager
    def _in_pass(self) -> Iterator[None]:
        """`at_work` for the network's own passes, in which each layer waits for its own weights."""
        self.offloader.load(self)
        with self.layout.groups.current():
            yield

    def persistent_tensors(self) -> Iterable[Tensor]:
        """See `Offloadable`."""
        return self.net.parameters()

    def sent_tensors(self) -> Iterable[Tensor]:
        return self.net.parameters()

    def transient_tensors(self) -> Iterable[Tensor]:
        return ()

    def drop_caches(self) -> None:
        """Transformer Engine's FP8 copies of the weights, which a pass makes from them."""
        drop_fp8_weights(self.net)

    def drop_leftovers(self) -> None:
        """Where the dispatchers of a mixture of experts sent the rows of the last micro-batch."""
        drop_routes(self.net)

    @torch.no_grad()
    def read(self, batch: Batch, owners: Tensor, size: int, cells: Cells, numbers: Callable[[Any], Tensor]) -> Tensor:
        """One pass over the rows that this data-parallel rank owns, without gradient: float32 [size].

        The rank has the numbers of these rows, whichever rows it holds besides; the others are zero.

        Args:
            batch, owners: the batch, and the data-parallel rank of each of its rows, int64 [n].
            size: length of the result.
            cells: the indices in the result of a micro-batch's numbers, int64 [m].
            numbers: these numbers from the model's output, float [m]. Called on the last pipeline stage.
        """
        parts = self._packed(batch, torch.arange(len(batch)), owners)
        own = {id(part): torch.zeros(len(cells(part))) for part in parts}

        def collect(micro: MicroBatch, output: Any) -> tuple[Tensor, Tensor]:
            read = numbers(output)
            if self.layout.is_reporter:
                own[id(micro)].copy_(read.detach().float())  # the pass that warms up FP8 scales has gradients
            nothing = read.new_zeros(())  # what is returned is kept until the end of the pass
            return nothing, nothing

        with self._in_pass():
            self.module.eval()
            self._warm_up_fp8_scales(parts, collect, forward_only=True)
            self._run(parts, collect, forward_only=True)
        shared = share_reported(torch.cat(list(own.values())), self.layout)
        result = torch.zeros(size)
        for part, flat in zip(parts, shared.split([len(flat) for flat in own.values()]), strict=True):
            result[cells(part)] = flat
        return result

    def _packed(self, batch: Batch, rows: Tensor, owners: Tensor) -> list[MicroBatch]:
        return micro_batches(
            batch,
            rows[owners[rows] == self.layout.data_rank],
            self.layout,
            self.micro_batch_tokens,
            self.device,
            token_multiple=self.net.token_multiple,
            with_grid=self.net.attends_on_grid,
            at_least=max(self._least_micro_batches, self._of_all_ranks(batch.lengths[rows], owners[rows])),
            has_routers=self.net.shape.experts is not None,
            with_choices=self.replay is not None,
        )

    def _of_all_ranks(self, lengths: Tensor, owners: Tensor) -> int:
        """The micro-batches that the data-parallel rank with the most has, if all ranks need as many.

        `lengths`, `owners`: int64 [n], of the rows of all ranks.
        """
        if self.net.shape.experts is None or not self.layout.shares_experts:
            return 0
        by_rank = (lengths[owners == rank] for rank in range(self.layout.data))
        return max(len(divide_by_budget(own, self.micro_batch_tokens)) for own in by_rank)

    @property
    def _least_micro_batches(self) -> int:
        """Micro-batches that Megatron's schedule needs: one for each stage if it interleaves chunks."""
        return self.layout.pipeline if self.layout.virtual_pipeline > 1 else 1

    @property
    def _wrapped_chunks(self) -> list[Any]:
        """This rank's chunks of the model with their wrappers; several under virtual pipeline stages."""
        return self.module.chunks if isinstance(self.module, WrappedChunks) else [self.module]

    def _warm_up_fp8_scales(self, parts: list[MicroBatch], loss: Loss, *, forward_only: bool) -> None:
        """Warm up FP8 delayed scaling with one throw-away micro-batch.

        Its scales start at 1. With these, FP8 loses most of a weight and all of a gradient. Transformer Engine updates
        the scales only in passes with gradient. A pass without a backward keeps nothing for one: layers are recomputed
        in training only, so the whole network's activations would not fit.
        """
        config, required = self.net.config, 1 if forward_only else 2
        if config.fp8 and config.fp8_recipe == "delayed" and self.fp8_scales_ready < required:
            with torch.enable_grad(), nothing_saved() if forward_only else nullcontext():
                self._run(parts[: self._least_micro_batches], loss, forward_only=forward_only)
            self.fp8_scales_ready = required

    def _run(self, parts: list[MicroBatch], loss: Loss, *, forward_only: bool) -> None:
        for part in parts:
            self.counted.add(part.tokens.numel(), part.padding)

        def forward_step(batches: Iterator[MicroBatch], model: Any, *_: Any) -> tuple[Tensor, Any]:
            progress_marker.mark()
            micro, replay = next(batches), self.replay
            given = micro if replay is None else replay.given_to(micro, chunks.index(model))
            return model(given), partial(loss, micro)

        chunks, config, groups = self._wrapped_chunks, self.net.config, self.layout.groups
        if len(chunks) > 1:
            config.microbatch_group_size_per_vp_stage = micro_batch_group(len(parts), self.layout.pipeline)
        get_forward_backward_func(self.layout.pipeline, config.virtual_pipeline_model_parallel_size)(
            forward_step_func=forward_step,
            data_iterator=[iter(parts) for _ in chunks] if len(chunks) > 1 else iter(parts),
            model=chunks,
            num_microbatches=len(parts),
            seq_length=max(part.tokens.numel() for part in parts),  # unused: lengths vary
            micro_batch_size=1,
            forward_only=forward_only,
            p2p_communicator=P2PCommunicator(groups.pp, config),
            pg_collection=groups,
        )
        if self.replay is not None:
            self.replay.clear()


@dataclass(slots=True)
class TrainedModel(Model):
    """A network under Megatron's data parallelism and distributed optimizer. `step_count`: optimizer steps taken."""

    optimizer: MegatronOptimizer = field(kw_only=True)
    gather: WeightGather | None = None  # None: the optimizer's step gathers the weights
    step_count: int = 0
    router_aux_loss_coef: float = 0.0  # of a mixture of experts
    copied: torch.cuda.Event | None = None  # when a checkpoint's copy of the weights and the optimizer is complete

    @classmethod
    def wrap(
        cls,
        net: PackedGPT | ModelChunks,
        layout: Layout,
        device: torch.device,
        parallel: ParallelConfig,
        offloader: ModelOffloader,
        router_aux_loss_coef: float = 0.0,
    ) -> TrainedModel:
        """Wrap a network whose weights are loaded already: the optimizer copies them as its fp32 main weights.

        `router_aux_loss_coef`: as `model.router_aux_loss_coef`.
        """
        config = net.config
        data_parallel = ddp_config(parallel, layout)
        groups = layout.groups
        ddps = [
            DistributedDataParallel(config, data_parallel, on_device(chunk, device), pg_collection=groups)
            for chunk in net.chunks
        ]
        optimizer = get_megatron_optimizer(
            MegatronOptimizerConfig(
                optimizer="adam",
                lr=0.0,  # set before each step
                weight_decay=0.0,
                bf16=config.bf16,
                params_dtype=config.params_dtype,
                use_distributed_optimizer=True,
            ),
            ddps,
            use_gloo_process_groups=False,
            pg_collection=groups,
        )
        note_param_order(optimizer)
        init_adam_state(optimizer)
        config.finalize_model_grads_func = finalize_model_grads
        gather = WeightGather(ddps, net.chunks) if data_parallel.overlap_param_gather else None
        module, tokens = as_one(ddps), parallel.micro_batch_tokens
        model = cls(net, layout, device, tokens, module, offloader, optimizer=optimizer, gather=gather)
        model.router_aux_loss_coef = router_aux_loss_coef
        offloader.load(model)
        return model

    def persistent_tensors(self) -> Iterable[Tensor]:
        """The weights, the optimizer's main weights and its moments."""
        self.wait_for_weights()
        yield from self.net.parameters()
        for inner in (part.optimizer for part in optimizer_parts(self.optimizer)):
            for group in inner.param_groups:
                yield from group["params"]
            for state in inner.state.values():
                yield from (value for value in state.values() if isinstance(value, Tensor) and value.dim() > 0)

    def transient_tensors(self) -> Iterable[Tensor]:
        """The gradients."""
        buffers = chain(self.module.buffers, self.module.expert_parallel_buffers)
        return (buffer.grad_data for buffer in buffers)

    def wait_for_weights(self) -> None:
        if self.gather is not None:
            self.gather.wait()

    def step(
        self, batch: Batch, rows: Tensor, owners: Tensor, loss: Loss, num_metrics: int, config: OptimizerConfig
    ) -> Step:
        """One optimizer step on the mean loss over `rows`. Skipped if a loss or the gradient is not finite.

        `owners`: int64 [n], the data-parallel rank of each row of the batch. `loss` turns a micro-batch and the model's
        output into (loss [m], metrics [m, `num_metrics`]), per row.
        """
        with self._in_pass():
            return self._step(batch, rows, owners, loss, num_metrics, config)

    def _step(
        self, batch: Batch, rows: Tensor, owners: Tensor, loss: Loss, num_metrics: int, config: OptimizerConfig
    ) -> Step:
        self.module.train()
        parts = self._packed(batch, rows, owners)
        tokens = int(batch.lengths[rows].sum())
        self._weigh_aux_loss(parts, tokens)
        # Megatron divides by the micro-batches of this rank and averages over the data-parallel ranks.
        scale = len(parts) * self.layout.data / len(rows)
        index = torch.full((len(batch),), -1).index_put((rows,), torch.arange(len(rows)))
        table = torch.zeros(len(rows), num_metrics + 1)  # the last column: the losses

        def scaled(micro: MicroBatch, output: Tensor) -> tuple[Tensor, Tensor]:
            by_row, metrics = loss(micro, output)
            if self.layout.is_reporter:
                columns = torch.cat((metrics, by_row.detach()[:, None]), dim=1)
                table[index[micro.rows]] = columns.float().cpu()
            # The empty sum keeps a micro-batch that has only padding in the graph.
            return by_row.sum() * scale + output[:0].sum(), metrics

        # Set only during the pass. A network whose config holds its optimizer is never freed: the cycle goes through
        # tensors that Python's garbage collector cannot follow, and process groups would keep their threads.
        self.net.config.grad_scale_func = self.optimizer.scale_loss
        self._warm_up_fp8_scales(parts, scaled, forward_only=False)
        self.module.zero_grad_buffer()
        with reduces_at_last_micro_batch(self._wrapped_chunks):
            self._run(parts, scaled, forward_only=False)
        self.net.config.grad_scale_func = None
        self._set_hyperparameters(config)
        self.optimizer.prepare_grads()
        grad_norm = float(self.optimizer.get_grad_norm())
        # One sum over ranks has the table and whether any rank has a non-finite norm, so all ranks decide alike.
        reports, flag = self._router_reports(parts), torch.tensor([0.0 if math.isfinite(grad_norm) else 1.0])
        ranks = torch.cat((table.flatten(), flag, reports.flatten()))
        summed, bad, of_routers = sum_over_ranks(ranks).split((table.numel(), 1, reports.numel()))
        metrics, losses = summed.view_as(table).split((num_metrics, 1), dim=1)
        made = float(bad) == 0.0 and bool(losses.isfinite().all())
        if made:
            self._update_weights()
        elif self.gather is not None:
            self.gather.skip()
        self.optimizer.zero_grad()  # now, because its fp32 copy of the gradients would stay until the next step
        experts = self.net.shape.experts
        report = None if experts is None else RouterReport(of_routers.view_as(reports), tokens, experts.per_token)
        return Step(metrics, losses.flatten(), grad_norm, made, report)

    def _weigh_aux_loss(self, parts: list[MicroBatch], tokens: int) -> None:
        """Give each of the mini-batch's `tokens` the same weight in the auxiliary loss, whatever its micro-batch."""
        for routed in (part.packing.routed for part in parts):
            # Megatron averages gradients over the copies of the model.
            routed.aux_loss_scale = self.router_aux_loss_coef * self.layout.copies / tokens

    def _router_reports(self, parts: list[MicroBatch]) -> Tensor:
        """What this rank's routers reported of a step's micro-batches, as in `RouterReport`; empty without routers."""
        experts = self.net.shape.experts
        if experts is None:
            return torch.zeros(0)
        return layer_reports([part.packing.routed for part in parts], self.net.shape.layers, experts.count)

    def _update_weights(self) -> None:
        """The optimizer's step, once the gradients are reduced. Collective."""
        if self.copied is not None:
            torch.cuda.current_stream(self.device).wait_event(self.copied)
            self.copied = None
        self.optimizer.step()
        self.step_count += 1
        if self.gather is not None:
            self.gather.start()

    def sharded_optimizer(self, weights: dict[str, Any], metadata: dict[str, Any]) -> dict[str, Any]:
        """What to read of a checkpoint of an earlier version. `weights`: the sharded weights of the same model."""
        with without_bucket_padding(self.optimizer):
            return self.optimizer.sharded_state_dict(weights, is_loading=True, metadata=metadata)

    def load_optimizer(self, state: dict[str, Any]) -> None:
        """Load a state that `sharded_optimizer` returned and that a checkpoint filled."""
        load_optimizer_state(self.optimizer, state)

    def _set_hyperparameters(self, config: OptimizerConfig) -> None:
        """Set before each step, because stages may differ in these. The learning rate warms up linearly."""
        warm = min(1.0, (self.step_count + 1) / config.warmup_steps) if config.warmup_steps else 1.0
        for optimizer in optimizer_parts(self.optimizer):
            optimizer.config.clip_grad = config.clip_grad
        for group in self.optimizer.param_groups:
            group["lr"] = config.lr * warm
            group["weight_decay"] = config.weight_decay * group.get("wd_mult", 1.0)
            group["betas"] = (config.beta1, config.beta2)
            group["eps"] = config.eps
