"""torch's ProcessGroupNCCL on the null GPU: one rank of a group whose other ranks are not there."""

from __future__ import annotations

import pytest

from tests.nullgpu.child import on_null_gpu

pytestmark = pytest.mark.nullgpu

GROUP = """
import torch.distributed as dist
os.environ["TORCH_NCCL_ASYNC_ERROR_HANDLING"] = "0"
dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=4)
"""


def in_group(code: str) -> object:
    lines = [line.strip() for line in code.strip().splitlines()]
    body = "\n".join([GROUP, *lines])
    return on_null_gpu(body)


def test_collectives_are_counted_by_kind_in_bytes_of_the_larger_buffer() -> None:
    told = in_group(
        """
        x = torch.ones(1000, dtype=torch.bfloat16).cuda()
        whole = torch.empty(4000, device="cuda", dtype=torch.bfloat16)
        dist.all_reduce(x)
        dist.all_gather_into_tensor(whole, x)
        gathered = whole.tolist()
        dist.reduce_scatter_tensor(x, whole)
        dist.broadcast(x, src=0)
        dist.all_to_all_single(whole, whole.clone())
        dist.send(x, 1)
        dist.recv(x, 1)
        torch.cuda.synchronize()
        from dataclasses import asdict
        tell([asdict(counters.read())["nccl"], set(gathered) == {1.0}])
        """
    )
    assert isinstance(told, list)
    kinds, is_gathered = told
    assert is_gathered
    one = {"calls": 1, "bytes": 2000}
    four = {"calls": 1, "bytes": 8000}
    for kind in ("all_reduce", "broadcast"):
        assert kinds[kind] == one, kind
    for kind in ("all_gather", "reduce_scatter"):
        assert kinds[kind] == four, kind
    alltoall = kinds["all_to_all"] if kinds["all_to_all"]["calls"] else None
    sends = 1 if alltoall else 5  # torch makes it of a send to, and a receive from, each rank
    assert kinds["send"]["calls"] == kinds["recv"]["calls"] == sends


def test_a_tensor_of_the_cpu_is_refused_by_torch() -> None:
    told = in_group("tell(raised(lambda: dist.all_reduce(torch.ones(3))))")
    assert told == ["RuntimeError", "No backend type associated with device type cpu"]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ("dist.all_reduce(torch.ones(3))", "Tensors must be CUDA and dense"),
        ("dist.broadcast(torch.ones(3), src=0)", "Tensors must be CUDA and dense"),
    ],
)
def test_a_cpu_tensor_that_reaches_an_nccl_group_is_refused(call: str, message: str) -> None:
    told = in_group(
        f"""
        from torch.distributed import distributed_c10d as c10d
        nccl = dist.group.WORLD._get_backend(torch.device("cuda"))
        dist.group.WORLD._register_backend(torch.device("cpu"), dist.ProcessGroup.BackendType.NCCL, nccl)
        tell(raised(lambda: {call}))
        """
    )
    assert isinstance(told, list)
    assert message in told[1]


def test_a_pointer_to_host_memory_gets_nccls_own_error() -> None:
    """Past torch: what a program that calls NCCL itself gets, and what torch turns into DistBackendError."""
    told = on_null_gpu(
        """
        import ctypes
        from ctypes import byref, c_char, c_int, c_size_t, c_void_p
        nccl = ctypes.CDLL(None)
        nccl.ncclGetLastError.restype = ctypes.c_char_p
        class Id(ctypes.Structure):
            _fields_ = [("internal", c_char * 128)]
        comm, unique = c_void_p(), Id()
        nccl.ncclGetUniqueId(byref(unique))
        found = [nccl.ncclCommInitRank(byref(comm), c_int(2), unique, c_int(2)), nccl.ncclGetLastError(None).decode()]
        nccl.ncclCommInitRank(byref(comm), c_int(2), unique, c_int(1))
        def reduce(a, b):
            return nccl.ncclAllReduce(c_void_p(a), c_void_p(b), c_size_t(4), c_int(7), c_int(0), comm, None)
        host, device = torch.ones(4), torch.ones(4, device="cuda")
        pinned, other = torch.ones(4).pin_memory(), torch.ones(4, device="cuda:1")
        found += [reduce(device.data_ptr(), device.data_ptr()), reduce(pinned.data_ptr(), device.data_ptr())]
        found += [reduce(host.data_ptr(), device.data_ptr()), nccl.ncclGetLastError(None).decode()]
        found += [reduce(device.data_ptr(), other.data_ptr()), nccl.ncclGetLastError(None).decode()]
        device_past_end = reduce(device.data_ptr() + (1 << 32), device.data_ptr())
        tell([*found, device_past_end])
        """,
        devices=2,
    )
    assert told[0] == 4
    assert told[1] == "Invalid rank requested : 2/2"
    assert told[2:4] == [0, 0]
    assert told[4] == 4
    assert "AllReduce : sendbuff" in told[5]
    assert "is not a valid pointer" in told[5]
    assert told[6] == 4
    assert "allocated on device 1" in told[7]
    assert told[8] == 4
