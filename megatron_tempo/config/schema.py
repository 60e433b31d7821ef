"""The configuration: one tree of dataclasses. All defaults are here and in `stages.py`.

The rules that join several fields are in `rules/`. Classes have slots, so that a field added by mistake (`+typo=1`)
fails when the tree is built. Lengths are in tokens, counts in prompts or responses as named. docs/configuration.md
is made from the classes' docstrings and the fields' comments.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any

from megatron_tempo.config.choices import (
    Device,
    Dispatch,
    EngineKind,
    EnginePrecision,
    Fusions,
    Layers,
    Logits,
    LogLevel,
    OnDrift,
    Placement,
    Precision,
    Published,
    Recompute,
    RouterReplay,
    SandboxKind,
    StaleGroups,
    Transport,
    Verifier,
)
from megatron_tempo.config.cluster import ClusterConfig
from megatron_tempo.config.extensions import Extension
from megatron_tempo.config.method_settings import PpoSettings, TempoSettings
from megatron_tempo.config.pipeline_layers import PipelineLayers
from megatron_tempo.config.sizes import expert_cut
from megatron_tempo.config.stages import StageConfig
from megatron_tempo.config.updates import CriticTargets


@dataclass(slots=True)
class RunConfig:
    """The run as a whole."""

    dir: str = "???"  # the run writes only below this folder
    seed: int = 0  # seed of all random draws of the trainer and of the embedded engine; servers: rollout.seed
    resume: bool = True  # resume from the newest complete checkpoint in run.dir; false: reject a folder that has one
    device: Device = Device.auto
    precision: Precision = Precision.fp32
    deterministic: bool = True  # use only deterministic algorithms of torch and Transformer Engine
    # maximum consecutive skipped steps of a model: steps whose loss or gradient is not finite
    max_consecutive_nonfinite_steps: int = 3
    hang_minutes: float | None = 30.0  # abort after this many minutes without progress on any rank; None: no limit


@dataclass(slots=True)
class ModelConfig:
    """Actor and critic."""

    path: str = "???"  # Hugging Face folder of the actor: config, safetensors, tokenizer
    critic_path: str | None = None  # the same for the critic; None: the actor's decoder with a value head of zeros
    layers: Layers = Layers.auto
    fusions: Fusions = Fusions.auto
    # layers at each end of the model that stay in bf16 when run.precision is an FP8 format
    num_bf16_layers_at_ends: int = 0
    logits: Logits = Logits.recomputed
    shape: Published | None = None  # a published model that `plan` plans for if model.path is not given
    router_replay: RouterReplay = RouterReplay.on  # of models with a mixture of experts
    router_aux_loss_coef: float = 0.0  # weight of the loss that balances the load of a mixture of experts


@dataclass(slots=True)
class CriticLayoutConfig:
    """The critic's parallel layout, where it differs from the actor's. None: as the actor."""

    tensor: int | None = None  # as parallel.tensor
    pipeline: int | None = None  # as parallel.pipeline
    # as parallel.num_layers_in_first_pipeline_stage if the critic has as many stages, else like the other stages
    num_layers_in_first_pipeline_stage: int | None = None
    num_layers_in_last_pipeline_stage: int | None = None  # the same for the last stage
    virtual_pipeline: int | None = None  # as parallel.virtual_pipeline if the critic has as many stages, else 1
    context: int | None = None  # as parallel.context
    expert: int | None = None  # as parallel.expert
    expert_tensor: int | None = None  # as parallel.expert_tensor
    sequence: bool | None = None  # as parallel.sequence


@dataclass(slots=True)
class ParallelConfig:
    """How the trainer's processes (ranks) share a model. The remaining factor is data parallelism."""

    tensor: int = 1  # ranks that share each layer's matrices
    # pipeline stages, one rank each; layers are divided evenly, and a remainder goes to stages before the last one
    pipeline: int = 1
    # layers of the first stage, the one with the input embedding; None: like the other stages
    num_layers_in_first_pipeline_stage: int | None = None
    # layers of the last stage, the one with the output layer; None: like the other stages
    num_layers_in_last_pipeline_stage: int | None = None
    # virtual pipeline stages of each stage: its layers are in as many chunks, and Megatron's schedule interleaves them
    virtual_pipeline: int = 1
    context: int = 1  # ranks that share the tokens of each micro-batch
    expert: int = 1  # ranks that share the experts of each layer; they are among the ranks of one pipeline stage
    expert_tensor: int | None = None  # ranks that share the matrices of each expert; None: as `tensor`
    sequence: bool = False  # sequence parallelism: the ranks of `tensor` share the tokens between the matrices
    critic: CriticLayoutConfig = field(default_factory=CriticLayoutConfig)
    world_size: int | None = None  # processes of the trainer: `check` needs it for data parallelism; None: as launched
    recompute: Recompute = Recompute.none
    overlap_grad_reduce: bool = True  # sum gradients over the replicas during the backward pass, bucket by bucket
    overlap_param_gather: bool = True  # gather updated weights during the next forward pass
    # parameters of a bucket of the overlaps; None: Megatron's, the larger of 40 million and a million for each replica
    ddp_bucket_size: int | None = None
    offload: bool = False  # one model at a time on the GPU; the others are in page-locked host memory
    # tokens of a packed micro-batch, over its context ranks; a longer row is a micro-batch of its own
    micro_batch_tokens: int = 16384
    bucket_mb: int = 512  # MiB of each bucket of a weight sync; larger tensors are sent in parts

    @property
    def ranks_of_a_replica(self) -> int:
        """Processes that share one copy of the model."""
        return self.tensor * self.pipeline * self.context

    @property
    def expert_cut(self) -> int:
        """Ranks that share the matrices of each expert."""
        return expert_cut(self.tensor, self.expert_tensor)

    @property
    def pipeline_layers(self) -> PipelineLayers:
        """How layers are divided over the pipeline stages."""
        ends = self.num_layers_in_first_pipeline_stage, self.num_layers_in_last_pipeline_stage
        return PipelineLayers(self.pipeline, *ends, self.virtual_pipeline)

    def of_critic(self) -> ParallelConfig:
        """The critic's layout. What the actor's stages have is the critic's only if the critic has as many stages."""
        own = {name: value for name in self.critic.__slots__ if (value := getattr(self.critic, name)) is not None}
        if own.get("pipeline", self.pipeline) != self.pipeline:
            ends = {"num_layers_in_first_pipeline_stage": None, "num_layers_in_last_pipeline_stage": None}
            own = {**ends, "virtual_pipeline": 1, **own}
        return replace(self, **own, critic=CriticLayoutConfig())


@dataclass(slots=True)
class DatasetConfig:
    """A file of questions."""

    path: str = "???"  # JSONL or Parquet, or what `reader` reads
    reader: Extension | None = None  # reader of the rows (docs/extending.md); None: by the file's extension
    prompt_field: str = "prompt"  # column of the question: text, or a list of `{role, content}` messages
    answer_field: str | None = None  # column of the answer; None: never read answers, even if the file has some
    verifier: Verifier | Extension | None = None
    verifier_field: str | None = None  # column that names the verifier of each row, if rows have different ones
    id_field: str | None = None  # column of the question's id; None: the row's number, from 0
    # text prompts become one user message; messages always use the template; `import:`: your own template instead of
    # the tokenizer's (docs/extending.md)
    chat_template: bool | Extension = True
    system: str | None = None  # system message, put first
    suffix: str = ""  # appended to the prompt, or to its last message, unless already there
    limit: int | None = None  # use only this many rows, from the first; None: all


@dataclass(slots=True)
class DataConfig:
    """The training sets."""

    labelled: DatasetConfig | None = None  # questions with answers
    unlabelled: DatasetConfig | None = None  # questions alone, whose answers no training step can read
    held_out: list[str] = field(default_factory=list)  # evaluation sets whose questions are not trained on


@dataclass(slots=True)
class ServersConfig:
    """The inference servers of `rollout.engine=sglang` and `vllm` (docs/engines.md)."""

    python: str = "python3"  # interpreter of the environment that the engine is installed in
    replicas: int = 1  # servers to start
    each_node: bool = False  # start `replicas` on every node, not only on the first
    addresses: list[str] | None = None  # `http://HOST:PORT` of running servers; None: start them
    key_file: str | None = None  # file with the key of the servers in `addresses`
    # address at which started servers and the trainer's weight senders listen; `hostname`: each node's own
    host: str = "127.0.0.1"
    # GPUs of a node, in order, `tensor` for each server, counted from 0 among those that the job sees
    # (CUDA_VISIBLE_DEVICES); None: the first ones that the trainer does not use
    devices: list[int] | None = None
    tensor: int = 1  # tensor parallelism of each server
    precision: EnginePrecision | None = None  # number format; None: run.precision, or bf16 if that is FP8
    arguments: list[str] = field(default_factory=list)  # more arguments, such as `--mem-fraction-static=0.8`
    transport: Transport = Transport.group
    dispatch: Dispatch = Dispatch.longest_first
    concurrency: int = 64  # concurrent requests per server
    # after every this many weight updates, compare all tensors that arrived and a part of those installed; 0: never
    checksums_every: int = 1
    restarts: int = 3  # restarts of a server within an iteration before it is given up
    start_seconds: float = 600.0  # time limit for a server to start, in seconds
    update_seconds: float = 300.0  # time limit for a server to load a bucket of weights, in seconds
    answer_seconds: float = 3600.0  # time limit for a server to answer a request, in seconds
    hang_seconds: float = 120.0  # a server with requests counts as hung after this many seconds without progress


@dataclass(slots=True)
class RolloutConfig:
    """How responses are generated."""

    # what generates the responses; `import:`: your own engine (docs/extending.md)
    engine: EngineKind | Extension = EngineKind.embedded
    servers: ServersConfig = field(default_factory=ServersConfig)
    # servers on GPUs of their own, or on the trainer's, by turns (docs/engines.md)
    placement: Placement = Placement.disaggregated
    # the most actor updates between a token's generation and its use; k: generate up to k iterations ahead
    max_staleness: int = 0
    stale_groups: StaleGroups = StaleGroups.wait  # what happens to a prompt group that would exceed `max_staleness`
    # the engine stops when an iteration has its prompt groups; unfinished responses continue in the next one. Servers
    # that generate while the run trains never stop
    partial_rollouts: bool = False
    # allowed difference between engine and trainer log-probabilities, in nats, averaged over tokens; None: 0.05, or 0.1
    # if trainer or servers compute in FP8, 0.15 if both do (docs/gpu.md)
    parity_tolerance: float | None = None
    # ask each server for a few responses after every this many weight updates and compare their log-probabilities; 0:
    # only at each start and restart. The iterations' own responses are always compared
    parity_every: int = 10
    on_drift: OnDrift = OnDrift.stop  # what happens when the engine's weights or log-probabilities are not the actor's
    max_prompt_tokens: int = 2048  # maximum tokens of a prompt; a longer one is an error
    max_response_tokens: int = 16384  # maximum tokens of a response; a longer one is cut off
    temperature: float = 1.0  # sampling temperature of training responses
    top_p: float = 1.0  # sample from the most probable tokens of this share; log-probabilities are over what is left
    top_k: int | None = None  # sample from this many of the most probable tokens; None: from all
    min_p: float = 0.0  # sample from tokens at least this many times as probable as the most probable one; 0: from all
    stop: list[str] = field(default_factory=list)  # strings that end a response, as a part of it that is trained on
    seed: int | None = None  # seed of the responses; None: run.seed if embedded, while servers draw their own numbers
    batch_rows: int = 256  # responses that the embedded engine decodes together, in each process
    dump: bool = False  # write each iteration's rollouts to `run.dir/rollouts`
    replay: str | None = None  # folder written by `dump`: read rollouts from it instead of generating them

    @property
    def is_served(self) -> bool:
        """Whether servers generate. A user's engine counts as part of the trainer's processes."""
        return isinstance(self.engine, EngineKind) and self.engine.is_served

    @property
    def is_colocated(self) -> bool:
        """Whether servers and trainer have the same GPUs, by turns."""
        return self.placement is Placement.colocated


@dataclass(slots=True)
class JudgeConfig:
    """The judge of data sets with `verifier=judge`: a server of OpenAI's chat completions (docs/evaluation.md)."""

    url: str | None = None  # its address, such as `http://HOST:PORT/v1`
    model: str | None = None  # the judge's model name at that server
    key_file: str | None = None  # file with the server's key; None: the server needs no key
    concurrency: int = 32  # concurrent requests per process of the trainer
    retries: int = 8  # retries of a request that fails or is rate-limited, over two minutes or more
    timeout_seconds: float = 300.0  # time limit of a request, in seconds
    max_tokens: int = 4096  # maximum tokens of a reply, including the judge's thoughts
    cache: str | None = None  # folder in which verdicts are cached; None: `run.dir/judge`


@dataclass(slots=True)
class MathConfig:
    """The processes that compare mathematical answers."""

    workers: int = 2  # worker processes that compare answers, per process of the trainer
    seconds: float = 5.0  # time limit per answer, in seconds; an answer that exceeds it is wrong


@dataclass(slots=True)
class CodeConfig:
    """The programs of data sets with `verifier=code` (docs/code.md)."""

    # where they run: bubblewrap (namespaces), subprocess (a process that locks itself), or auto: the first that works
    sandbox: SandboxKind = SandboxKind.auto
    workers: int = 8  # programs that run at a time, per process of the trainer that verifies
    seconds: float = 6.0  # processor time of a test, in seconds; a program that exceeds it is wrong
    wall_seconds: float = 60.0  # time limit of all tests of a program, in seconds
    memory_mb: int = 1024  # memory of a program (its address space), in MiB
    python: str | None = None  # interpreter of the programs; None: this program's own, without its packages


@dataclass(slots=True)
class RewardsConfig:
    """How responses are verified."""

    math: MathConfig = field(default_factory=MathConfig)
    code: CodeConfig = field(default_factory=CodeConfig)
    judge: JudgeConfig = field(default_factory=JudgeConfig)
    # read an answer from a response whose thought (`<think>`) does not end; false: it has no answer
    read_unfinished_thoughts: bool = False


@dataclass(slots=True)
class EvaluationConfig:
    """What is measured on which questions, and when."""

    # iterations between evaluations, in addition to those before, between and after the stages; 0: only those
    every: int = 10
    samples: int = 16  # responses to a question: avg@samples
    pass_k: list[int] = field(default_factory=lambda: [8])  # report pass@k for these k
    temperature: float = 1.0  # sampling temperature; 0: greedy, the most probable token each time
    top_p: float = 1.0  # as rollout.top_p
    top_k: int | None = None  # as rollout.top_k
    min_p: float = 0.0  # as rollout.min_p
    stop: list[str] | None = None  # as rollout.stop; None: rollout.stop
    seed: int | None = None  # as rollout.seed
    max_response_tokens: int | None = None  # maximum tokens of a response; None: rollout.max_response_tokens
    sets: dict[str, DatasetConfig] = field(default_factory=dict)  # questions with answers, by names that you choose
    # also let the responses to a question vote, and record how far a vote's rewards agree with the verdicts
    votes: bool = False
    calibration_set: str | None = None  # name of the set on which to measure the critic's calibration; None: do not


@dataclass(slots=True)
class CheckpointConfig:
    """Checkpoints and exports."""

    every: int = 20  # iterations between checkpoints, in addition to the one at the end; 0: only that
    keep: int = 2  # number of newest checkpoints to keep; older ones are removed
    asynchronous: bool = True  # continue training while a checkpoint is written from a copy in host memory; false: wait
    export_hf: bool = True  # at the end, write the actor and the critic as Hugging Face folders


@dataclass(slots=True)
class MetricsConfig:
    """Where metrics are reported, in addition to the run's records."""

    log_level: LogLevel = LogLevel.info  # least severe messages of the first rank on the console
    progress: bool = True  # a progress bar where the output is a terminal
    tensorboard: bool = False  # write TensorBoard's files to `run.dir/tensorboard`
    wandb_project: str | None = None  # project of Weights & Biases to report to; None: do not
    report: bool = True  # write `run.dir/report.html` at the end


@dataclass(slots=True)
class ProfileConfig:
    """Traces of iterations (docs/monitoring.md)."""

    # iterations, counted from 1, to trace to `run.dir/profile/step_N/rank_R.json.gz`
    steps: list[int] = field(default_factory=list)


@dataclass(slots=True)
class Config:
    """The tree."""

    run: RunConfig = field(default_factory=RunConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    rewards: RewardsConfig = field(default_factory=RewardsConfig)
    stage1: StageConfig = field(default_factory=lambda: StageConfig(PpoSettings()))
    stage2: StageConfig = field(default_factory=lambda: StageConfig(TempoSettings(), unlabelled_prompts=256))
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    metrics: MetricsConfig = field(default_factory=MetricsConfig)
    profile: ProfileConfig = field(default_factory=ProfileConfig)
    cluster: ClusterConfig | None = None

    def stages(self) -> dict[str, StageConfig]:
        """The stages in order, by name, including empty ones."""
        return {"stage1": self.stage1, "stage2": self.stage2}

    @property
    def has_critic(self) -> bool:
        """Whether the run has a critic. None is built if no stage's method needs one."""
        return any(stage.has_critic for stage in self.stages().values() if stage.iterations > 0)

    @property
    def compares_answers(self) -> bool:
        """Whether a stage's rewards come from which answers to an unlabelled question are equal."""
        return any(stage.needs.classes for stage in self.stages().values() if stage.iterations > 0)

    def critic_targets(self, stage_name: str) -> CriticTargets:
        """What the critic's values mean in or after a stage: the targets of the last stage so far that trained it.

        The stage's own if no stage did.
        """
        targets = self.stages()[stage_name].critic.targets
        for name, stage in self.stages().items():
            if stage.iterations > 0 and stage.trains_critic:
                targets = stage.critic.targets
            if name == stage_name:
                break
        return targets


def to_plain(value: Any) -> Any:
    """A config or part of it as dicts, lists and scalars, with enums by name, as it is written to JSON."""
    if isinstance(value, Enum | Extension):
        return value.name
    if isinstance(value, StageConfig):
        return to_plain(value.named_fields())
    if hasattr(value, "__dataclass_fields__"):
        return {name: to_plain(getattr(value, name)) for name in value.__dataclass_fields__}
    if isinstance(value, dict):
        return {key: to_plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_plain(item) for item in value]
    return value
