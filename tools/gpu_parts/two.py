"""Two processes of this machine on one GPU, for the parts that need a second rank.

NCCL refuses two ranks on one GPU. Then the tensors of a group go through host memory and gloo instead (`Staged`): slow,
but Megatron's code for the layout, the shards and the GPU's kernels are the real ones. NCCL itself is not tested so.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from gpu_parts.setting import Setting

WORLD = 2
BACKEND = "staged"


class StagedWork(dist._Work):
    """A message on its way through host memory. `wait` brings what was received to the GPU."""

    def __init__(self, works: Sequence[Any], results: Sequence[tuple[Tensor, Tensor]] = ()) -> None:
        super().__init__()
        self._works, self._results = works, results

    def wait(self, timeout: timedelta | None = None) -> bool:
        for work in self._works:
            work.wait()
        for target, host in self._results:
            target.detach().copy_(host)
        self._works, self._results = (), ()
        return True

    def is_completed(self) -> bool:
        return all(work.is_completed() for work in self._works)


class Staged(dist.ProcessGroup):
    """A process group for tensors on a GPU or a CPU whose messages are gloo's, through copies on the CPU."""

    def __init__(self, store: dist.Store, rank: int, size: int, timeout: timedelta) -> None:
        super().__init__(rank, size)
        self._gloo: Any = dist.ProcessGroupGloo(store, rank, size, timeout)
        self._group_name = ""

    def getBackendName(self) -> str:
        return BACKEND

    @property
    def group_name(self) -> str:
        return self._group_name

    def _set_group_name(self, name: str) -> None:
        self._group_name = name

    def _set_group_desc(self, _: str) -> None: ...

    @property
    def pg_name(self) -> str:
        return self._group_name

    def _set_sequence_number_for_group(self) -> None: ...

    def allreduce(self, tensors: list[Tensor], opts: Any = None) -> StagedWork:
        hosts = [tensor.cpu() for tensor in tensors]
        options = dist.AllreduceOptions()
        is_mean = opts is not None and opts.reduceOp == dist.ReduceOp.AVG
        options.reduceOp = dist.ReduceOp.SUM if is_mean or opts is None else opts.reduceOp
        self._gloo.allreduce(hosts, options).wait()
        for host in hosts if is_mean else ():
            host.div_(self.size())
        return done(zip(tensors, hosts, strict=True))

    allreduce_coalesced = allreduce

    def broadcast(self, tensors: list[Tensor], opts: Any) -> StagedWork:
        hosts = [tensor.cpu() for tensor in tensors]
        self._gloo.broadcast(hosts, opts).wait()
        return done(zip(tensors, hosts, strict=True))

    def allgather(self, outputs: list[list[Tensor]], inputs: list[Tensor], opts: Any = None) -> StagedWork:
        hosts = [torch.empty_like(tensor, device="cpu") for tensor in outputs[0]]
        self._gloo.allgather([hosts], [inputs[0].cpu()]).wait()
        return done(zip(outputs[0], hosts, strict=True))

    def _allgather_base(self, output: Tensor, given: Tensor, opts: Any = None) -> StagedWork:
        return self.allgather([list(output.view(-1).chunk(self.size()))], [given.reshape(-1)])

    def allgather_into_tensor_coalesced(
        self, outputs: list[Tensor], inputs: list[Tensor], opts: Any = None
    ) -> StagedWork:
        for output, given in zip(outputs, inputs, strict=True):
            self._allgather_base(output, given)
        return done(())

    def _reduce_scatter_base(self, output: Tensor, given: Tensor, opts: Any = None) -> StagedWork:
        whole = given.reshape(-1).cpu()
        self.allreduce([whole], opts)
        return done([(output.view(-1), whole.chunk(self.size())[self.rank()])])

    def reduce_scatter(self, outputs: list[Tensor], inputs: list[list[Tensor]], opts: Any = None) -> StagedWork:
        return self._reduce_scatter_base(outputs[0], torch.cat([part.reshape(-1) for part in inputs[0]]), opts)

    def reduce_scatter_tensor_coalesced(
        self, outputs: list[Tensor], inputs: list[Tensor], opts: Any = None
    ) -> StagedWork:
        for output, given in zip(outputs, inputs, strict=True):
            self._reduce_scatter_base(output, given, opts)
        return done(())

    # Their names in torch 2.13.
    all_gather_single, reduce_scatter_single = _allgather_base, _reduce_scatter_base
    all_gather_single_coalesced = allgather_into_tensor_coalesced
    reduce_scatter_single_coalesced = reduce_scatter_tensor_coalesced

    def gather(self, outputs: list[list[Tensor]], inputs: list[Tensor], opts: Any) -> Any:
        """On the CPU, for Python objects."""
        return self._gloo.gather(outputs, inputs, opts)

    def barrier(self, opts: Any = None) -> StagedWork:
        self._gloo.barrier().wait()
        return done(())

    def send(self, tensors: list[Tensor], peer: int, tag: int) -> StagedWork:
        return StagedWork([self._gloo.send([tensor.cpu() for tensor in tensors], peer, tag)])

    def recv(self, tensors: list[Tensor], peer: int, tag: int) -> StagedWork:
        hosts = [torch.empty_like(tensor, device="cpu") for tensor in tensors]
        return StagedWork([self._gloo.recv(hosts, peer, tag)], list(zip(tensors, hosts, strict=True)))


def done(results: Iterator[tuple[Tensor, Tensor]] | Sequence[tuple[Tensor, Tensor]]) -> StagedWork:
    """The work of a call whose results are on the CPU already. They are on the GPU at once: nobody has to wait."""
    for target, host in results:
        target.detach().copy_(host)  # what is received may be a leaf that requires a gradient
    return StagedWork(())


def register() -> None:
    if BACKEND not in dist.Backend.backend_list:
        dist.Backend.register_backend(BACKEND, Staged, devices=["cpu", "cuda"])


@contextmanager
def through_host_memory() -> Iterator[None]:
    """Inside, the default process group, and those made from it without a backend of their own, are `Staged`."""
    original = dist.init_process_group

    def init(_: str, **options: Any) -> None:
        register()
        original(BACKEND, **options)

    dist.init_process_group = init
    try:
        yield
    finally:
        dist.init_process_group = original


def start(module: str, setting: Setting, arguments: Sequence[str], seconds: float) -> list[int]:
    """Run `python -m gpu_parts.MODULE SETTING ARGUMENTS` as both ranks. Returns the exit codes; -9 for a killed rank.

    Their output is in FOLDER/MODULE-rankN.log. A rank is killed after `seconds`, or 5 s after the other has failed.
    """
    shared = os.environ | {"WORLD_SIZE": str(WORLD), "MASTER_ADDR": "127.0.0.1", "LOCAL_RANK": "0"}
    shared["MASTER_PORT"] = str(free_port())
    processes = []
    for rank in range(WORLD):
        with (setting.folder / f"{module}-rank{rank}.log").open("ab") as log:
            command = [sys.executable, "-m", f"gpu_parts.{module}", setting.written(), *arguments]
            environment = shared | {"RANK": str(rank)}
            processes.append(subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT))
    deadline = time.monotonic() + seconds
    while any(one.poll() is None for one in processes) and time.monotonic() < deadline:
        if any(one.poll() for one in processes):
            deadline = min(deadline, time.monotonic() + 5)  # the other waits for it
        time.sleep(0.05)
    for one in processes:
        if one.poll() is None:
            one.kill()
    return [one.wait() for one in processes]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def last_words(setting: Setting, module: str) -> str:
    """The last line of each rank's log."""
    words = []
    for rank in range(WORLD):
        text = Path(setting.folder / f"{module}-rank{rank}.log").read_text(encoding="utf-8", errors="replace")
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        words.append(f"rank {rank}: {lines[-1][:200] if lines else 'no output'}")
    return "; ".join(words)
