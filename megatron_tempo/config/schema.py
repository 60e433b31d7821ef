"""The configuration: one tree of dataclasses. Every default stands here and nowhere else.

The rules that join several fields are in `rules.py`. Classes have slots, so that a field added by mistake
(`+typo=1`) fails when the tree is built. Lengths are in tokens, counts in prompts or responses as named.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any


class Published(Enum):
    """Models whose shapes `plan` knows without their folders."""

    qwen3_8b = "qwen3_8b"
    qwen3_14b = "qwen3_14b"
    olmo3_7b = "olmo3_7b"


class Device(Enum):
    auto = "auto"  # cuda where there is one, else cpu
    cpu = "cpu"
    cuda = "cuda"


class Precision(Enum):
    """Of the trainer. FP8 is for the products of the layers' linear maps; all else is then as in bf16.

    What each FP8 recipe needs stands in `config/recipes.py`.
    """

    fp32 = "fp32"
    bf16 = "bf16"
    fp8_delayed = "fp8_delayed"  # one scale a tensor, from the largest magnitude of the pass before
    fp8_tensorwise = "fp8_tensorwise"  # one scale a tensor, from its own largest magnitude
    fp8_blockwise = "fp8_blockwise"  # a scale for 128 numbers, for 128 x 128 of a weight
    mxfp8 = "mxfp8"  # a scale for 32 numbers, a power of two

    @property
    def numbers(self) -> Precision:
        """What weights, and everything outside those products, are kept in: fp32 or bf16."""
        return Precision.fp32 if self is Precision.fp32 else Precision.bf16


class Layers(Enum):
    """Who implements the decoder's layers."""

    auto = "auto"  # Transformer Engine on CUDA in bf16 or FP8, where it is installed; else local
    local = "local"  # Megatron's own linear layers, torch's attention
    transformer_engine = "transformer_engine"


class EngineKind(Enum):
    embedded = "embedded"  # a transformers model in the trainer's processes
    sglang = "sglang"  # SGLang servers
    vllm = "vllm"  # vLLM servers


class EnginePrecision(Enum):
    fp32 = "fp32"
    bf16 = "bf16"
    fp8 = "fp8"  # the layers' matrices in blocks of 128 x 128, the rest in bf16


class Transport(Enum):
    """How weights go to a server."""

    group = "group"  # a process group with its workers: NCCL, gloo on a CPU
    shared = "shared"  # memory of this machine that its workers open: a GPU's (CUDA IPC), /dev/shm on a CPU


class Dispatch(Enum):
    """Which request goes next to the server that has the least to do."""

    in_order = "in_order"
    longest_first = "longest_first"  # the longest prompt


class Recompute(Enum):
    """Which activations the backward pass makes once more instead of keeping them."""

    none = "none"
    attention = "attention"  # those inside the attention, between its projections
    layers = "layers"  # all but each layer's input


class Logits(Enum):
    """What becomes of the actor's logits between the forward and the backward pass."""

    recomputed = "recomputed"  # made a piece at a time, twice: memory does not grow with tokens times vocabulary
    stored = "stored"  # kept: one product with the output layer less


class Method(Enum):
    """The training methods; each is megatron_tempo/methods/NAME.py."""

    ppo = "ppo"  # PPO on verified answers
    tempo = "tempo"
    ttrl = "ttrl"  # the majority's answer as the label
    empo = "empo"  # the share of responses with the same answer as the reward
    grpo = "grpo"  # verified answers, a prompt's responses held against one another


class Prompts(Enum):
    labelled = "labelled"
    unlabelled = "unlabelled"


@dataclass(frozen=True, slots=True)
class Needs:
    """Which prompts a method's actor and critic learn from. A critic with prompts of its own has an E-step.

    Without a critic a prompt's responses are held against one another.
    """

    actor: Prompts
    critic: Prompts | None  # none: a method without a critic
    classes: bool = False  # rewards come from which of a prompt's responses have equal answers

    @property
    def estep(self) -> bool:
        return self.critic is not None and self.critic is not self.actor


NEEDS = {
    Method.ppo: Needs(actor=Prompts.labelled, critic=Prompts.labelled),
    Method.tempo: Needs(actor=Prompts.unlabelled, critic=Prompts.labelled),
    Method.ttrl: Needs(actor=Prompts.unlabelled, critic=None, classes=True),
    Method.empo: Needs(actor=Prompts.unlabelled, critic=None, classes=True),
    Method.grpo: Needs(actor=Prompts.labelled, critic=None),
}


class Verifier(Enum):
    """Who compares a response with an answer; each is megatron_tempo/rewards/NAME.py."""

    math = "math"
    countdown = "countdown"
    choice = "choice"  # letters of options
    text = "text"  # a word, a number or a list of them
    grid = "grid"  # a logic grid
    judge = "judge"  # a language model, rewards.judge


class Baseline(Enum):
    """Where reward and baseline of a token's advantage are read (docs/method.md has the table)."""

    before_token = "before_token"  # A_t = V(x, y_1:T) - V(x, y_<t)
    paper = "paper"  # Eq. 11 to the letter: A_t = V(x, y_1:T) - V(x, y_1:t)
    reference = "reference"  # the published code: A_t = V(x, y_<T) - V(x, y_<t)


class ValueTiming(Enum):
    after_estep = "after_estep"  # the paper: the recalibrated critic judges the M-step's responses
    before_estep = "before_estep"  # the published code


class CriticTargets(Enum):
    zero_one = "zero_one"  # the paper: I in {0, 1}
    plus_minus_one = "plus_minus_one"  # the published code: I in {-1, 1}


class Ratio(Enum):
    sequence = "sequence"  # GSPO: the geometric mean of the tokens' ratios
    token = "token"  # PPO


@dataclass(slots=True)
class RunConfig:
    dir: str = "???"  # everything the run writes goes below this folder
    seed: int = 0
    resume: bool = True  # go on from the newest whole checkpoint in `dir`; false: refuse a folder that has one
    device: Device = Device.auto
    precision: Precision = Precision.fp32
    deterministic: bool = True  # torch's deterministic algorithms
    max_skipped: int = 3  # optimizer steps of a model in a row whose loss or gradient is not finite, then the run stops
    hang_minutes: float | None = 30.0  # without progress on any rank, until the run is ended; none: no limit


@dataclass(slots=True)
class ModelConfig:
    path: str = "???"  # Hugging Face folder of the actor: config, safetensors, tokenizer
    critic_path: str | None = None  # Hugging Face folder of the critic; none: the actor's decoder, a zero value head
    layers: Layers = Layers.auto
    bf16_ends: int = 0  # layers at either end that stay in bf16 where run.precision is an FP8 one
    logits: Logits = Logits.recomputed
    shape: Published | None = None  # what `plan` plans for while model.path is not given


@dataclass(slots=True)
class CriticLayoutConfig:
    """Where the critic is laid out otherwise than the actor; none: as the actor."""

    tensor: int | None = None
    pipeline: int | None = None
    context: int | None = None
    sequence: bool | None = None


@dataclass(slots=True)
class ParallelConfig:
    tensor: int = 1
    pipeline: int = 1
    context: int = 1  # ranks that share the tokens of each micro-batch
    sequence: bool = False  # sequence parallelism inside the tensor-parallel groups
    critic: CriticLayoutConfig = field(default_factory=CriticLayoutConfig)
    world_size: int | None = None  # processes; none: as launched. `check` wants it for the data-parallel rules
    recompute: Recompute = Recompute.none
    offload: bool = False  # one model at a time on the GPU; the others wait in page-locked host memory
    micro_batch_tokens: int = 16384  # packed tokens of one micro-batch, over its context ranks; longer rows go alone
    bucket_mb: int = 512  # size of the buckets in which weights travel, MiB

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
    path: str = "???"  # JSONL or Parquet
    prompt_field: str = "prompt"  # text, or a list of {role, content} messages
    answer_field: str | None = None  # none: the answers, if the file has any, are never read
    verifier: Verifier | None = None  # who compares a response with the answer; without answers, with other responses
    verifier_field: str | None = None  # a column that names it for each row, where rows differ
    id_field: str | None = None  # none: the row's number, from 0
    chat_template: bool = True  # text prompts become one user message; messages always go through the template
    system: str | None = None  # a system message put first
    suffix: str = ""  # appended to a text prompt
    limit: int | None = None  # the first so many rows


@dataclass(slots=True)
class DataConfig:
    labelled: DatasetConfig | None = None
    unlabelled: DatasetConfig | None = None
    held_out: list[str] = field(default_factory=list)  # evaluation sets whose questions are not trained on


@dataclass(slots=True)
class ServersConfig:
    """The inference servers of `rollout.engine=sglang` and `vllm`."""

    python: str = "python3"  # of the environment that the engine is installed in
    replicas: int = 1  # servers to start
    each_node: bool = False  # start so many on every node, not on the first alone
    addresses: list[str] | None = None  # http://HOST:PORT of servers that run already; none: start them
    key_file: str | None = None  # file with the key of those servers
    host: str = "127.0.0.1"  # address that started servers, and the senders of weights, listen at; a name: its own
    devices: list[int] | None = None  # GPUs of a node, `tensor` a server in their order; none: those in sight
    tensor: int = 1  # tensor parallelism of each server
    precision: EnginePrecision | None = None  # of its weights; none: run.precision, or bf16 where that is an FP8 one
    arguments: list[str] = field(default_factory=list)  # more of its command line, such as --mem-fraction-static=0.8
    transport: Transport = Transport.group
    dispatch: Dispatch = Dispatch.longest_first
    concurrency: int = 64  # requests that a server has under way at a time
    checksums_every: int = 1  # weight updates from one comparison of all tensors to the next; 0: none
    restarts: int = 3  # of each server, before it is given up
    start_seconds: float = 600.0  # until it must be ready
    update_seconds: float = 300.0  # until it must have taken a bucket of weights
    answer_seconds: float = 3600.0  # until it must have answered a request
    hang_seconds: float = 120.0  # without any progress, while it has requests, until it counts as hung


@dataclass(slots=True)
class RolloutConfig:
    engine: EngineKind = EngineKind.embedded
    servers: ServersConfig = field(default_factory=ServersConfig)
    max_staleness: int = 0  # 1: the next batch is generated while this one trains; updates between a token and its use
    parity_tolerance: float = 0.05  # nats: how far engine and trainer may be apart, a mean over tokens, at each start
    max_prompt_tokens: int = 2048
    max_response_tokens: int = 16384
    temperature: float = 1.0
    batch_rows: int = 256  # rows that the embedded engine decodes together
    dump: bool = False  # write each iteration's rollouts to DIR/rollouts/
    replay: str | None = None  # read rollouts from such a folder instead of generating


@dataclass(slots=True)
class JudgeConfig:
    """A server of OpenAI's chat completions, which the sets with verifier=judge ask."""

    url: str | None = None  # http://HOST:PORT/v1
    model: str | None = None  # its name there
    key_file: str | None = None  # file with the server's key; none: it wants none
    concurrency: int = 32  # requests that a process of the trainer has under way at a time
    retries: int = 8  # of a request that fails or is told to come later, over two minutes and more
    timeout_seconds: float = 300.0  # until it must have answered
    max_tokens: int = 4096  # of a reply, the judge's thoughts included
    cache: str | None = None  # folder in which verdicts are kept; none: DIR/judge


@dataclass(slots=True)
class RewardsConfig:
    judge: JudgeConfig = field(default_factory=JudgeConfig)


@dataclass(slots=True)
class OptimizerConfig:
    lr: float = 1e-6
    warmup_steps: int = 0  # linear, from lr / warmup_steps
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    clip_grad: float = 1.0


@dataclass(slots=True)
class ActorUpdateConfig:
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    mini_batch_prompts: int = 64
    epochs: int = 1
    ratio: Ratio = Ratio.sequence
    clip_low: float = 3e-4  # the ratio is clipped to [1 - clip_low, 1 + clip_high]
    clip_high: float = 5e-4
    dual_clip: float | None = None  # bound on ratio * |A| for A < 0, > 1 (Ye et al. 2020)
    importance_cap: float | None = None  # weigh tokens by min(pi_old / pi_engine, cap) (Yao et al. 2025); none: by 1
    entropy_coef: float = 0.0  # bonus, per token, nats
    kl_coef: float = 0.0  # k3 estimate of KL(pi || reference) per token; the reference is model.path
    whiten_advantages: bool = False


@dataclass(slots=True)
class CriticUpdateConfig:
    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(lr=5e-6))
    mini_batch_prompts: int = 64
    epochs: int = 1
    warmup_iterations: int = 0  # iterations at the stage's start that update the critic alone
    targets: CriticTargets = CriticTargets.zero_one
    clip: float | None = None  # how far a response's mean value may move before the loss holds on to it; none: freely
    drop_uniform_groups: bool = False  # leave out prompts whose responses are all right or all wrong


@dataclass(slots=True)
class StageConfig:
    """One stage of training by one method. A stage of 0 iterations is passed over."""

    method: Method = Method.tempo
    iterations: int = 0
    labelled_prompts: int = 256  # an iteration
    unlabelled_prompts: int = 0  # an iteration
    responses_per_prompt: int = 8
    actor: ActorUpdateConfig = field(default_factory=ActorUpdateConfig)
    critic: CriticUpdateConfig = field(default_factory=CriticUpdateConfig)
    baseline: Baseline = Baseline.before_token
    value_timing: ValueTiming = ValueTiming.after_estep
    estep_every: int = 1  # iterations from one E-step to the next; 0: never, a frozen critic
    actor_on_labelled: bool = False  # the published code: labelled rows, with verified rewards, in the actor's batch
    group_std: bool = True  # without a critic: advantages are divided by the standard deviation of a prompt's rewards
    vote_responses: int | None = None  # ttrl: responses a prompt that vote; none: the responses_per_prompt learnt from
    entropy_low: float | None = None  # empo: prompts whose answers' entropy, in nats, is not between the two are left
    entropy_high: float | None = None  # out; none: no bound

    @property
    def has_critic(self) -> bool:
        return NEEDS[self.method].critic is not None

    @property
    def trains_critic(self) -> bool:
        return self.has_critic and not (NEEDS[self.method].estep and self.estep_every == 0)

    @property
    def samples(self) -> int:
        """Responses that are sampled for a prompt."""
        return self.vote_responses or self.responses_per_prompt

    def warms_up(self, iteration: int) -> bool:
        """Whether the iteration, from 0, is of the critic's warm-up: the actor then stays as it is."""
        return iteration < self.critic.warmup_iterations

    def critic_learns(self, iteration: int) -> bool:
        """Whether the iteration, from 0, updates the critic."""
        if not self.trains_critic:
            return False
        return not NEEDS[self.method].estep or self.warms_up(iteration) or iteration % self.estep_every == 0

    def prompts_at(self, iteration: int) -> set[Prompts]:
        """The prompts that the iteration, from 0, needs answered."""
        actor = set() if self.warms_up(iteration) else self.actor_prompts()
        return actor | (self.critic_prompts() if self.critic_learns(iteration) else set())

    def actor_prompts(self) -> set[Prompts]:
        """The prompts whose responses the actor learns from."""
        extra = {Prompts.labelled} if self.actor_on_labelled else set()
        return {NEEDS[self.method].actor} | extra

    def critic_prompts(self) -> set[Prompts]:
        """The prompts whose responses the critic learns from: none where it is frozen or absent."""
        critic = NEEDS[self.method].critic
        return {critic} if critic is not None and self.trains_critic else set()

    def prompts(self) -> set[Prompts]:
        """All prompts that an iteration needs."""
        return self.actor_prompts() | self.critic_prompts()

    def count(self, prompts: set[Prompts]) -> int:
        """How many of the given prompts an iteration has."""
        of = {Prompts.labelled: self.labelled_prompts, Prompts.unlabelled: self.unlabelled_prompts}
        return sum(of[kind] for kind in prompts)


@dataclass(slots=True)
class EvaluationConfig:
    every: int = 10  # iterations; always also before, between and after the stages. 0: only those
    samples: int = 16  # responses a question: avg@samples
    pass_k: list[int] = field(default_factory=lambda: [8])
    temperature: float = 1.0
    max_response_tokens: int | None = None  # none: rollout.max_response_tokens
    sets: dict[str, DatasetConfig] = field(default_factory=dict)
    calibration_set: str | None = None  # the set on which the critic's calibration is measured


@dataclass(slots=True)
class CheckpointConfig:
    every: int = 20  # iterations; always also at the end. 0: only there
    keep: int = 2  # whole checkpoints kept
    export_hf: bool = True  # at the end, write the actor and the critic as Hugging Face folders


@dataclass(slots=True)
class MetricsConfig:
    progress: bool = True  # a progress bar where the output is a terminal
    tensorboard: bool = False
    wandb_project: str | None = None
    report: bool = True  # DIR/report.html at the end


@dataclass(slots=True)
class ProfileConfig:
    steps: list[int] = field(default_factory=list)  # iterations, from 1, traced to DIR/profile/step_N/rank_R.json.gz


@dataclass(slots=True)
class SlurmConfig:
    """How a site takes jobs, for `submit` alone. What is none is left to SLURM's own defaults."""

    partition: str | None = None
    account: str | None = None
    time_limit: str | None = None  # of a job: MINUTES, HH:MM:SS or D-HH:MM:SS
    grace_seconds: int = 600  # before the limit's end: an iteration and a checkpoint must fit in
    gres: str | None = "gpu"  # what the site calls a GPU, such as gpu:h100; none: it names none
    cpus_per_task: int | None = None  # CPUs that come with each GPU
    options: list[str] = field(default_factory=list)  # more of sbatch's, such as --qos=high
    modules: list[str] = field(default_factory=list)  # to load
    environment: dict[str, str] = field(default_factory=dict)  # of all processes, such as NCCL_IB_HCA: mlx5
    interface: str | None = None  # network interface of NCCL's and gloo's sockets
    container: str | None = None  # image, for srun's --container-image (pyxis); none: without
    mounts: list[str] = field(default_factory=list)  # HOST:CONTAINER; run.dir and the working folder come of themselves
    python: str | None = None  # of the jobs; none: the one that submits, in a container python3


@dataclass(slots=True)
class ClusterConfig:
    """The machines that `plan` plans for and `submit` submits to. Rates are peaks as the vendor tells them, shares are
    assumptions of ours."""

    gpu: str = ""  # its name; `check` knows by it what `run.precision` may be
    nodes: int = 1
    rollout_nodes: int = 0  # the last so many of them serve alone: `submit` starts rollout.servers.replicas on each
    gpus_per_node: int = 8
    memory_gb: float = 0.0  # of a GPU, 10^9 bytes
    reserve_gb: float = 6.0  # of it left alone: CUDA contexts, NCCL's and cuBLAS's buffers, gaps between tensors
    bf16_tflops: float = 0.0  # dense
    memory_tbs: float = 0.0  # TB/s
    nvlink_gbs: float = 0.0  # GB/s of a GPU in one direction, inside a node
    network_gbs: float = 0.0  # GB/s of a GPU in one direction, between nodes
    host_gbs: float = 64.0  # GB/s of a GPU to and from its host's memory, in one direction; 64: PCIe 5.0 x16
    compute_share: float = 0.4  # of bf16_tflops that a training pass reaches
    memory_share: float = 0.6  # of memory_tbs that decoding reaches
    link_share: float = 0.5  # of a link that a weight sync reaches
    slurm: SlurmConfig = field(default_factory=SlurmConfig)

    @property
    def training_nodes(self) -> int:
        return self.nodes - self.rollout_nodes

    @property
    def gpus(self) -> int:
        return self.nodes * self.gpus_per_node


@dataclass(slots=True)
class Config:
    run: RunConfig = field(default_factory=RunConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    rewards: RewardsConfig = field(default_factory=RewardsConfig)
    stage1: StageConfig = field(default_factory=lambda: StageConfig(method=Method.ppo))
    stage2: StageConfig = field(default_factory=lambda: StageConfig(method=Method.tempo, unlabelled_prompts=256))
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    metrics: MetricsConfig = field(default_factory=MetricsConfig)
    profile: ProfileConfig = field(default_factory=ProfileConfig)
    cluster: ClusterConfig | None = None  # for `plan` and `submit`, and for `check` to know the GPU

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
        return any(NEEDS[stage.method].classes for stage in self.stages().values() if stage.iterations > 0)

    def critic_targets(self, stage_name: str) -> CriticTargets:
        """What the critic's values mean in or after a stage: the targets of the last that trained it, up to this one.

        The stage's own where none did.
        """
        found = self.stages()[stage_name].critic.targets
        for name, stage in self.stages().items():
            if stage.iterations > 0 and stage.trains_critic:
                found = stage.critic.targets
            if name == stage_name:
                break
        return found


def to_plain(value: Any) -> Any:
    """A config or part of it as dicts, lists and scalars, enums by name: what is written to JSON."""
    if isinstance(value, Enum):
        return value.name
    if hasattr(value, "__dataclass_fields__"):
        return {name: to_plain(getattr(value, name)) for name in value.__dataclass_fields__}
    if isinstance(value, dict):
        return {key: to_plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_plain(item) for item in value]
    return value
