"""Fields of the machines that `plan` plans for and `submit` submits to."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(slots=True)
class SlurmConfig:
    """SLURM settings of a site, used only by `submit` (docs/cluster.md). None: SLURM's own default."""

    partition: str | None = None  # partition
    account: str | None = None  # account to charge
    time_limit: str | None = None  # time limit of a job: `MINUTES`, `HH:MM:SS` or `D-HH:MM:SS`, in quotes
    # a job is asked to stop this long before its limit: an iteration and a checkpoint must fit
    grace_seconds: int = 600
    gres: str | None = "gpu"  # the site's name of a GPU, such as `gpu:h100`; None: request no GPUs
    cpus_per_task: int | None = None  # CPUs for each GPU
    options: list[str] = field(default_factory=list)  # more options of sbatch, such as `--qos=high`
    modules: list[str] = field(default_factory=list)  # environment modules to load
    environment: dict[str, str] = field(default_factory=dict)  # environment variables, such as `NCCL_IB_HCA: mlx5`
    interface: str | None = None  # network interface of NCCL's and gloo's sockets
    container: str | None = None  # image, for srun's `--container-image` (pyxis); None: no container
    mounts: list[str] = field(default_factory=list)  # `HOST:CONTAINER`, in addition to run.dir and the working folder
    python: str | None = None  # interpreter of the jobs; None: the one that runs `submit`, or `python3` in a container


@dataclass(slots=True)
class ClusterConfig:
    """The machines that `plan` plans for and `submit` submits to: `cluster=NAME` (docs/planning.md). Rates are the
    vendor's peaks, shares are our assumptions.
    """

    gpu: str = ""  # name of the GPU, such as H100; `check` uses it to validate run.precision
    nodes: int = 1  # number of machines, including those that only serve
    # how many nodes, the last ones, only serve: `submit` starts rollout.servers.replicas on each
    rollout_nodes: int = 0
    gpus_per_node: int = 8  # GPUs of a node
    memory_gb: float = 0.0  # memory of a GPU, in GB (10^9 bytes)
    reserve_gb: float = 6.0  # GB of that kept free for CUDA contexts, NCCL's and cuBLAS's buffers, fragmentation
    # GB that a sleeping colocated server keeps of a GPU: its CUDA context, NCCL's buffers, CUDA graphs
    asleep_gb: float = 5.0
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
