"""The layout of a model over the GPUs and the shape of its micro-batches, as far as memory and time depend on them."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_tempo.config.choices import Device, Fusions, Layers, Precision, Recompute
from megatron_tempo.config.pipeline_layers import PipelineLayers
from megatron_tempo.config.recipes import RECIPES
from megatron_tempo.config.sampled import truncates
from megatron_tempo.config.schema import Config, ParallelConfig
from megatron_tempo.config.sizes import GRID_SLACK, expert_cut


@dataclass(frozen=True, slots=True)
class PlannedLayout:
    """`data` replicas of the model, each on tensor x pipeline x context GPUs.

    >>> PlannedLayout(tensor=4, pipeline=2, data=1).world
    8
    """

    tensor: int = 1
    pipeline: int = 1
    data: int = 1
    sequence: bool = False
    context: int = 1
    recompute: Recompute = Recompute.none
    first_stage_layers: int | None = None  # as in `PipelineLayers`
    last_stage_layers: int | None = None
    virtual_pipeline: int = 1
    expert: int = 1  # ranks that share the experts of a layer
    expert_tensor: int | None = None  # ranks that share an expert's matrices; None: as `tensor`

    @property
    def expert_cut(self) -> int:
        """Ranks that share an expert's matrices."""
        return expert_cut(self.tensor, self.expert_tensor)

    @property
    def expert_data(self) -> float:
        """Ranks with the same experts, which share their optimizer state."""
        return self.world / (self.pipeline * self.expert * self.expert_cut)

    @property
    def pipeline_layers(self) -> PipelineLayers:
        """How layers are divided over the pipeline stages."""
        return PipelineLayers(self.pipeline, self.first_stage_layers, self.last_stage_layers, self.virtual_pipeline)

    @property
    def world(self) -> int:
        return self.tensor * self.pipeline * self.context * self.data

    def stage_of(self, rank: int) -> int:
        """The pipeline stage of a process: the stage is Megatron's outermost dimension of ranks."""
        return rank * self.pipeline // self.world


@dataclass(frozen=True, slots=True)
class PlannedMachine:
    """The type of weights and activations, and the device: bytes and kernels depend on them."""

    size: int = 2  # bytes per number: 2 in bf16, 4 in fp32
    cuda: bool = True
    te: bool = False  # Transformer Engine: its layers, and its Adam, which needs no memory for a step
    fused: bool = False  # its layers' fused operations: rotary embedding, SwiGLU, weight gradients
    truncates: bool = False  # top-p, top-k or min-p in training: recomputed logits are those of plain torch

    @property
    def one_swiglu(self) -> bool:
        """Whether SwiGLU is one operation: the trainer's own layers have theirs, Transformer Engine's only if fused."""
        return self.fused or not self.te

    @property
    def mixed(self) -> bool:
        """Whether the optimizer keeps fp32 main weights in addition to the model's."""
        return self.size != 4


@dataclass(frozen=True, slots=True)
class PlannedMicroBatch:
    """The largest micro-batch of a rank, and the number of micro-batches that one pass has on the device.

    Micro-batches of one row of 16 + 112 tokens, for a rank with 4 rows:

    >>> PlannedMicroBatch(tokens=128, responses=112, grid=128, count=4)
    """

    tokens: int  # S, on this rank
    responses: int  # R: tokens among them that predict a response token
    grid: int  # cells of the attention grid: rows times the longest row
    count: int  # micro-batches per optimizer step


def machine_of(config: Config) -> PlannedMachine:
    """The precision, the device and the layers of a configuration. Whether `model.layers=auto` finds Transformer Engine
    is not known here: local layers need more."""
    cuda = config.run.device is not Device.cpu
    te = config.run.precision in RECIPES or config.model.layers is Layers.transformer_engine
    te = te and cuda
    size = 4 if config.run.precision is Precision.fp32 else 2
    fused = te and config.model.fusions is Fusions.auto
    return PlannedMachine(size, cuda, te, fused, truncates(config.rollout))


def layout_of(own: ParallelConfig, world: int) -> PlannedLayout:
    """The layout over `world` processes. The configuration has passed the rules."""
    data = world // own.ranks_of_a_replica
    ends = own.num_layers_in_first_pipeline_stage, own.num_layers_in_last_pipeline_stage, own.virtual_pipeline
    shares = own.tensor, own.pipeline, data, own.sequence, own.context
    return PlannedLayout(*shares, own.recompute, *ends, own.expert, own.expert_tensor)


def row_tokens(config: Config) -> int:
    """Tokens of the longest row, of training or of an evaluation."""
    rollout, asked = config.rollout, config.evaluation.max_response_tokens or 0
    return rollout.max_prompt_tokens + max(rollout.max_response_tokens, asked if config.evaluation.sets else 0)


def micro_batch_of(config: Config, layout: PlannedLayout, rows: int) -> PlannedMicroBatch:
    """The largest micro-batch when a pass has `rows` rows of full length, over all replicas.

    A micro-batch has `parallel.micro_batch_tokens` tokens, or one longer row. Its attention grid may be GRID_SLACK
    times that if it contains several rows. If prompts are short, nearly all of its tokens predict response tokens.
    """
    longest, budget = row_tokens(config), config.parallel.micro_batch_tokens
    tokens = max(longest, budget)
    grid = max(longest, int(GRID_SLACK * budget))
    share = -(-rows // layout.data)
    count = max(1, -(-share // max(1, budget // longest)))
    tokens, grid = -(-tokens // layout.context), -(-grid // layout.context)
    return PlannedMicroBatch(tokens, tokens, grid, count)
