"""The configuration: one tree of dataclasses. Every default stands here and in `stages.py`, and nowhere else.

The rules that join several fields are in `rules/`. Classes have slots, so that a field added by mistake (`+typo=1`)
fails when the tree is built. Lengths are in tokens, counts in prompts or responses as named. A class's docstring and
the comment beside a field are what docs/configuration.md tells of them.
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
    Layers,
    Logits,
    Precision,
    Published,
    Recompute,
    Transport,
    Verifier,
)
from megatron_tempo.config.extensions import Extension
from megatron_tempo.config.stages import CriticTargets, PpoSettings, StageConfig, TempoSettings


@dataclass(slots=True)
class RunConfig:
    """The run as a whole."""

    dir: str = "???"  # everything the run writes goes below this folder
    seed: int = 0  # seed of every draw of the trainer and of the embedded engine; servers draw their own
    resume: bool = True  # go on from the newest whole checkpoint in run.dir; false: refuse a folder that has one
    device: Device = Device.auto
    precision: Precision = Precision.fp32
    deterministic: bool = True  # use deterministic algorithms alone, torch's and Transformer Engine's
    # the run stops after this many consecutive steps of a model whose loss or gradient is not finite
    max_consecutive_nonfinite_steps: int = 3
    hang_minutes: float | None = 30.0  # minutes without progress on any rank, until the run is ended; none: no limit


@dataclass(slots=True)
class ModelConfig:
    """Actor and critic."""

    path: str = "???"  # Hugging Face folder of the actor: config, safetensors, tokenizer
    critic_path: str | None = None  # the same of the critic; none: the actor's decoder with a value head of zeros
    layers: Layers = Layers.auto
    # layers at each end of the model that stay in bf16 when run.precision is an FP8 format
    num_bf16_layers_at_ends: int = 0
    logits: Logits = Logits.recomputed
    shape: Published | None = None  # a published model that `plan` plans for while model.path is not given


@dataclass(slots=True)
class CriticLayoutConfig:
    """Where the critic is laid out otherwise than the actor; none: as the actor."""

    tensor: int | None = None  # as parallel.tensor
    pipeline: int | None = None  # as parallel.pipeline
    context: int | None = None  # as parallel.context
    sequence: bool | None = None  # as parallel.sequence


@dataclass(slots=True)
class ParallelConfig:
    """How the trainer's processes (ranks) share a model; data parallelism takes the ranks that are left."""

    tensor: int = 1  # ranks that share each layer's matrices
    pipeline: int = 1  # stages into which the layers are cut, a rank each
    context: int = 1  # ranks that share the tokens of each micro-batch
    sequence: bool = False  # sequence parallelism: the ranks of `tensor` share the tokens between the matrices
    critic: CriticLayoutConfig = field(default_factory=CriticLayoutConfig)
    world_size: int | None = None  # processes of the trainer, for `check` to know data parallelism; none: as launched
    recompute: Recompute = Recompute.none
    offload: bool = False  # one model at a time on the GPU; the others wait in the host's memory (page-locked)
    micro_batch_tokens: int = 16384  # tokens of a packed micro-batch, over its context ranks; a longer row goes alone
    bucket_mb: int = 512  # MiB of the buckets in which weights go to the engine

    @property
    def ranks_of_a_replica(self) -> int:
        """Processes that hold and work on one copy of the model together."""
        return self.tensor * self.pipeline * self.context

    def of_critic(self) -> ParallelConfig:
        """The same with the critic's layout in the actor's place."""
        own = {name: value for name in self.critic.__slots__ if (value := getattr(self.critic, name)) is not None}
        return replace(self, **own, critic=CriticLayoutConfig())


@dataclass(slots=True)
class DatasetConfig:
    """A file of questions."""

    path: str = "???"  # JSONL or Parquet, or what `reader` reads
    reader: Extension | None = None  # who reads the rows (docs/extending.md); none: by the name of the file
    prompt_field: str = "prompt"  # column of the question: text, or a list of `{role, content}` messages
    answer_field: str | None = None  # column of the answer; none: answers, if the file has any, are never read
    verifier: Verifier | Extension | None = None
    verifier_field: str | None = None  # column that names the verifier of each row, where rows differ in it
    id_field: str | None = None  # column of the question's name; none: the row's number, from 0
    # text prompts become one user message; messages always go through the template; `import:`: a template of your own
    # in place of the tokenizer's (docs/extending.md)
    chat_template: bool | Extension = True
    system: str | None = None  # a system message put first
    suffix: str = ""  # appended to a prompt; of messages, to the last one, unless that has it already
    limit: int | None = None  # the first so many rows; none: all


@dataclass(slots=True)
class DataConfig:
    """What is trained on."""

    labelled: DatasetConfig | None = None  # questions with answers
    unlabelled: DatasetConfig | None = None  # questions alone, whose answers no training step can read
    held_out: list[str] = field(default_factory=list)  # evaluation sets whose questions are not trained on


@dataclass(slots=True)
class ServersConfig:
    """The inference servers of `rollout.engine=sglang` and `vllm` (docs/engines.md)."""

    python: str = "python3"  # interpreter of the environment that the engine is installed in
    replicas: int = 1  # servers to start
    each_node: bool = False  # start `replicas` on every node, not on the first alone
    addresses: list[str] | None = None  # `http://HOST:PORT` of servers that run already; none: start them
    key_file: str | None = None  # file with the key of the servers in `addresses`
    # address at which started servers, and the trainer's senders of weights, listen; `hostname`: each node's own
    host: str = "127.0.0.1"
    # GPUs of a node, in order, `tensor` of them a server, counted from 0 among those that the job sees
    # (CUDA_VISIBLE_DEVICES); none: all of these
    devices: list[int] | None = None
    tensor: int = 1  # tensor parallelism of each server
    precision: EnginePrecision | None = None  # number format; none: run.precision, or bf16 where that is FP8
    arguments: list[str] = field(default_factory=list)  # more of their command line: `--mem-fraction-static=0.8`
    transport: Transport = Transport.group
    dispatch: Dispatch = Dispatch.longest_first
    concurrency: int = 64  # requests that a server has under way at a time
    checksums_every: int = 1  # weight updates from one comparison of all tensors to the next; 0: none
    restarts: int = 3  # restarts of a server within an iteration, before it is given up
    start_seconds: float = 600.0  # seconds until a started server must be ready
    update_seconds: float = 300.0  # seconds until a server must have taken a bucket of weights
    answer_seconds: float = 3600.0  # seconds until a server must have answered a request
    hang_seconds: float = 120.0  # seconds without progress, while it has requests, until a server counts as hung


@dataclass(slots=True)
class RolloutConfig:
    """How responses are generated."""

    # who generates the responses; `import:`: an engine of your own (docs/extending.md)
    engine: EngineKind | Extension = EngineKind.embedded
    servers: ServersConfig = field(default_factory=ServersConfig)
    # updates of the actor between a token and its use, 0 or 1; 1: the next batch is generated while this one trains
    max_staleness: int = 0
    # nats by which the log-probabilities of engine and trainer may differ at each start, a mean over tokens
    parity_tolerance: float = 0.05
    max_prompt_tokens: int = 2048  # tokens of a prompt; a longer one is an error
    max_response_tokens: int = 16384  # tokens of a response; a longer one is cut off
    temperature: float = 1.0  # temperature of the responses that are trained on
    batch_rows: int = 256  # responses that the embedded engine decodes together, in each process
    dump: bool = False  # write each iteration's rollouts to `run.dir/rollouts`
    replay: str | None = None  # folder that `dump` wrote, to read rollouts from instead of generating them

    @property
    def is_served(self) -> bool:
        """Whether servers generate. An engine of the user's own counts as part of the trainer's processes."""
        return isinstance(self.engine, EngineKind) and self.engine.is_served


@dataclass(slots=True)
class JudgeConfig:
    """A server of OpenAI's chat completions, which data sets with `verifier=judge` ask (docs/evaluation.md)."""

    url: str | None = None  # its address, such as `http://HOST:PORT/v1`
    model: str | None = None  # the judge's name at that server
    key_file: str | None = None  # file with the server's key; none: the server wants none
    concurrency: int = 32  # requests that a process of the trainer has under way at a time
    retries: int = 8  # more tries for a request that fails or is told to come later, over two minutes and more
    timeout_seconds: float = 300.0  # seconds until a request must have been answered
    max_tokens: int = 4096  # tokens of a reply, the judge's thoughts included
    cache: str | None = None  # folder in which verdicts are kept; none: `run.dir/judge`


@dataclass(slots=True)
class MathConfig:
    """The processes that compare mathematical answers."""

    workers: int = 2  # processes of each of the trainer's processes that compare answers
    seconds: float = 5.0  # seconds that one answer may take; then it is wrong


@dataclass(slots=True)
class RewardsConfig:
    """How responses are verified."""

    math: MathConfig = field(default_factory=MathConfig)
    judge: JudgeConfig = field(default_factory=JudgeConfig)
    # read an answer from a response whose thought (`<think>`) does not end; false: it has none
    read_unfinished_thoughts: bool = False


@dataclass(slots=True)
class EvaluationConfig:
    """What is measured on which questions, and when."""

    every: int = 10  # iterations from one to the next, besides before, between and after the stages; 0: only those
    samples: int = 16  # responses to a question: avg@samples
    pass_k: list[int] = field(default_factory=lambda: [8])  # the k of every pass@k that is reported
    temperature: float = 1.0  # temperature of these responses
    max_response_tokens: int | None = None  # tokens of a response; none: rollout.max_response_tokens
    sets: dict[str, DatasetConfig] = field(default_factory=dict)  # questions with answers, by names that you choose
    calibration_set: str | None = None  # name of the set on which the critic's calibration is measured; none: it is not


@dataclass(slots=True)
class CheckpointConfig:
    """What is kept of a run."""

    every: int = 20  # iterations from one to the next, besides the one at the end; 0: only that
    keep: int = 2  # the newest so many checkpoints; older ones are removed
    asynchronous: bool = True  # train on while one is written, from a copy in host memory; false: wait for it
    export_hf: bool = True  # at the end, write the actor and the critic as Hugging Face folders


@dataclass(slots=True)
class MetricsConfig:
    """What is told of a run, besides its records."""

    progress: bool = True  # a progress bar where the output is a terminal
    tensorboard: bool = False  # write TensorBoard's files to `run.dir/tensorboard`
    wandb_project: str | None = None  # project of Weights & Biases to report to; none: do not
    report: bool = True  # write `run.dir/report.html` at the end


@dataclass(slots=True)
class ProfileConfig:
    """Traces of iterations (docs/monitoring.md)."""

    # iterations, counted from 1, to trace to `run.dir/profile/step_N/rank_R.json.gz`
    steps: list[int] = field(default_factory=list)


@dataclass(slots=True)
class SlurmConfig:
    """How a site takes jobs, for `submit` alone (docs/cluster.md). What is none is left to SLURM's own defaults."""

    partition: str | None = None  # partition of the jobs
    account: str | None = None  # account that they are charged to
    time_limit: str | None = None  # limit of a job: `MINUTES`, `HH:MM:SS` or `D-HH:MM:SS`, in quotes
    grace_seconds: int = 600  # before its limit a job is told to stop: an iteration and a checkpoint must fit
    gres: str | None = "gpu"  # what the site calls a GPU, such as `gpu:h100`; none: GPUs are not asked for
    cpus_per_task: int | None = None  # CPUs that come with each GPU
    options: list[str] = field(default_factory=list)  # more of sbatch's, such as `--qos=high`
    modules: list[str] = field(default_factory=list)  # environment modules to load
    environment: dict[str, str] = field(default_factory=dict)  # variables of all processes, such as `NCCL_IB_HCA: mlx5`
    interface: str | None = None  # network interface of NCCL's and gloo's sockets
    container: str | None = None  # image, for srun's `--container-image` (pyxis); none: no container
    mounts: list[str] = field(default_factory=list)  # `HOST:CONTAINER`, besides run.dir and the working folder
    python: str | None = None  # interpreter of the jobs; none: the one that submits, in a container `python3`


@dataclass(slots=True)
class ClusterConfig:
    """The machines that `plan` plans for and `submit` submits to: `cluster=NAME` (docs/planning.md). Rates are peaks
    as the vendor tells them, shares are assumptions of ours.
    """

    gpu: str = ""  # its name, such as H100; `check` knows by it what run.precision may be
    nodes: int = 1  # machines, those that only serve included
    rollout_nodes: int = 0  # the last so many nodes only serve: `submit` starts rollout.servers.replicas on each
    gpus_per_node: int = 8  # GPUs of a node
    memory_gb: float = 0.0  # GB (10^9 bytes) of a GPU
    reserve_gb: float = 6.0  # GB of that left alone: CUDA contexts, NCCL's and cuBLAS's buffers, gaps between tensors
    bf16_tflops: float = 0.0  # TFLOP/s of a GPU in bf16, dense
    memory_tbs: float = 0.0  # TB/s of a GPU's memory
    nvlink_gbs: float = 0.0  # GB/s of a GPU in one direction, inside a node
    network_gbs: float = 0.0  # GB/s of a GPU in one direction, between nodes
    host_gbs: float = 64.0  # GB/s of a GPU to and from its host's memory, in one direction; 64: PCIe 5.0 x16
    compute_share: float = 0.4  # share of `bf16_tflops` that a training pass reaches
    memory_share: float = 0.6  # share of `memory_tbs` that decoding reaches
    link_share: float = 0.5  # share of a link that a weight sync reaches
    slurm: SlurmConfig = field(default_factory=SlurmConfig)

    @property
    def training_nodes(self) -> int:
        return self.nodes - self.rollout_nodes

    @property
    def gpus(self) -> int:
        return self.nodes * self.gpus_per_node


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
        """The stages in their order, by name, empty ones included."""
        return {"stage1": self.stage1, "stage2": self.stage2}

    @property
    def has_critic(self) -> bool:
        """Whether the run has a critic: where no stage's method needs one, none is built."""
        return any(stage.has_critic for stage in self.stages().values() if stage.iterations > 0)

    @property
    def compares_answers(self) -> bool:
        """Whether a stage's rewards come from which answers to an unlabelled question are equal."""
        return any(stage.needs.classes for stage in self.stages().values() if stage.iterations > 0)

    def critic_targets(self, stage_name: str) -> CriticTargets:
        """What the critic's values mean in or after a stage: the targets of the last that trained it, up to this one.

        The stage's own where none did.
        """
        targets = self.stages()[stage_name].critic.targets
        for name, stage in self.stages().items():
            if stage.iterations > 0 and stage.trains_critic:
                targets = stage.critic.targets
            if name == stage_name:
                break
        return targets


def to_plain(value: Any) -> Any:
    """A config or part of it as dicts, lists and scalars, enums by name: what is written to JSON."""
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
