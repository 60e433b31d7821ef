"""What differs between SGLang and vLLM: how a server is started, which requests it takes and what it answers.

An adapter sends nothing itself: it builds calls and reads answers. Dispatch, fault handling and weight updates are
written once, in `fleet.py` and `servers.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from megatron_tempo.config.choices import EnginePrecision
from megatron_tempo.config.routing import RoutingFormat
from megatron_tempo.config.schema import ServersConfig
from megatron_tempo.rollout.engine import Request, Sampling
from megatron_tempo.rollout.engine_versions import EngineVersions
from megatron_tempo.rollout.read_back import Selection
from megatron_tempo.rollout.slices import Places, Slices
from megatron_tempo.types import Bucket, whole_name


@dataclass(frozen=True, slots=True)
class Call:
    """A POST of a JSON body to a path of the server; a GET where there is no body.

    `expects`: what the answer's JSON must have; another answer is a refusal.
    """

    path: str
    body: dict[str, Any] | None = None
    expects: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Start:
    """How a server is started: its index in the run, where it listens, and what it serves.

    `folder`: the server's own. `model`: the Hugging Face folder whose config and tokenizer it reads.
    """

    config: ServersConfig
    model: Path
    folder: Path
    host: str
    port: int
    key: str
    precision: EnginePrecision


@dataclass(frozen=True, slots=True)
class Launch:
    """A command line, and the environment variables that it needs in addition to the trainer's."""

    command: list[str]
    environment: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class WeightGroupInfo:
    """Where a sender of weights waits for a server's workers: a torch store, and the group's name in it."""

    host: str
    port: int
    group: str
    world: int
    backend: str
    seconds: float


# Number formats of servers.
DTYPES = {EnginePrecision.fp32: "float32", EnginePrecision.bf16: "bfloat16", EnginePrecision.fp8: "bfloat16"}

# The environment of a server on a CPU. With large pages for large tensors an update takes half as long.
ON_CPU = {"OMP_NUM_THREADS": "1", "THP_MEM_ALLOC_ENABLE": "1"}
# And its KV cache: by default, both engines reserve most of the machine's memory.
CACHE_BYTES_ON_CPU = 512 << 20


def described(bucket: Bucket) -> dict[str, list[Any]]:
    """The description of a bucket's bytes that a receiver needs. A part of a tensor has the tensor's name."""
    return {
        "names": [whole_name(name) for name, _ in bucket],
        "dtypes": [str(tensor.dtype).removeprefix("torch.") for _, tensor in bucket],
        "shapes": [list(tensor.shape) for _, tensor in bucket],
    }


class ServerAdapter(Protocol):
    """Made for servers of `tensor` workers, on a CPU or on GPUs."""

    routing: RoutingFormat | None  # of the experts that the servers return, where a request asks for them
    name: str
    takes_parts: bool  # whether `update` takes a tensor that is larger than a bucket in parts
    asks_for_parts: Call | None  # asks a server that others have started whether it does; None: it does as the others
    versions: EngineVersions
    asks_for_version: Call  # answered with JSON that has a "version"
    health: Call  # answered with 200 by a server that is ready
    progress: Call  # shows progress, to tell a slow server from a hung one
    answer_format: str  # of the answers to `generate`: a key of `answer_formats.ANSWER_FORMATS`
    memory_option: str  # the option for its share of a GPU's memory

    def launch(self, start: Start) -> Launch: ...

    def answers_parts(self, answer: str) -> bool:
        """Whether the answer to `asks_for_parts` says that the server takes parts."""
        ...

    def progress_of(self, answer: str) -> str | None:
        """From the answer to `progress`: a text that changes with every step. None if any answer shows progress."""
        ...

    def generate(self, request: Request, sampling: Sampling, end_tokens: Sequence[int]) -> Call: ...

    def interrupt(self) -> list[Call]:
        """End all generation now: requests are answered with the tokens that there are. `resume` may follow."""
        ...

    def join_group(self, group_info: WeightGroupInfo) -> Call: ...

    def before_update(self) -> list[Call]:
        """Pause generation and open an update."""
        ...

    def asks_for_places(self) -> Call | None:
        """The call for what each worker needs of the tensors; None if workers take only whole ones."""
        ...

    def other_ends(self, model: Path, *, found: bool) -> str | None:
        """A warning if the engine ends responses also at tokens that are not the run's end tokens.

        `found`: the servers were started by somebody else.
        """
        ...

    def places(self, answer: Any) -> Places:
        """The answer to `asks_for_places`, in the order of the workers."""
        ...

    def update(
        self, bucket: Bucket, group: str | None, version: int, *, compare: bool, slices: Slices | None = None
    ) -> Call:
        """Load a bucket: by a broadcast of the tensors' bytes in `group`, or, without a group, from shared memory.

        `compare`: whether `checksums` follows. `slices`: what is sent instead of a broadcast of all.
        """
        ...

    def after_update(self, version: int) -> list[Call]:
        """Close the update and drop what was cached under the older weights."""
        ...

    def resume(self) -> list[Call]:
        """Resume generation."""
        ...

    def sleep(self) -> list[Call]:
        """Give the memory of weights and KV cache back, without a copy of them. The server is awake, without requests.

        If it has requests, the calls fail and the server continues.
        """
        ...

    def wake_weights(self) -> list[Call]:
        """Take the memory of the weights, whose contents are undefined. An update follows. The server is asleep."""
        ...

    def wake_cache(self) -> list[Call]:
        """Take the memory of the KV cache and empty the prefix cache. The weights are loaded."""
        ...

    def checksums(self) -> Call | None:
        """The call for the checksums of all tensors that arrived in the last update. None if there are none."""
        ...

    def expected(self, bucket: Bucket) -> dict[str, tuple[str, float]]:
        """(checksum, root mean square) of each tensor under the server's names; NaN if the server has no sizes."""
        ...

    def parse_checksums(self, answer: Any) -> list[dict[str, tuple[str, float]]]:
        """The answer to `checksums` in the form of `expected`, one for each worker that answered."""
        ...

    def read_back(self, selection: Selection) -> Call:
        """The call for the checksums of what is installed: of the selected tensors, or of more."""
        ...

    def not_installed(
        self, expected: dict[str, tuple[str, float]], selection: Selection, answer: Any
    ) -> list[tuple[str, float]]:
        """The tensors that the answer to `read_back` shows not to be installed as `expected`, in `differing`'s form."""
        ...
