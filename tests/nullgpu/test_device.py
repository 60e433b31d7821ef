"""torch on the null GPU: the device, its memory, what is counted, and what is refused as by real hardware."""

from __future__ import annotations

import os
import subprocess
import threading
from pathlib import Path

import pytest

from megatron_tempo.nullgpu import build
from megatron_tempo.nullgpu.environment import environment
from tests.nullgpu.child import on_null_gpu, run

pytestmark = pytest.mark.nullgpu
GB = 10**9


def test_every_source_compiles_without_a_warning_against_nvidias_headers(tmp_path: Path) -> None:
    assert {"-Wall", "-Wextra"} < set(build.FLAGS)
    includes = [f"-I{folder}" for folder in build.include_folders()]
    for source in sorted(build.SOURCES.glob("*.c")):
        command = ["gcc", *build.FLAGS, *build.STRICT, *includes, "-idirafter", str(build.SOURCES / "shim")]
        command += [f"-I{build.SOURCES}", "-c", str(source), "-o", str(tmp_path / "a.o")]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr) == (0, ""), source.name


def test_builds_that_start_at_once_both_serve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    found: list[Path] = []
    threads = [threading.Thread(target=lambda: found.append(build.libraries())) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found[0] == found[1]
    assert [path.name for path in build.cache_root().iterdir()] == [found[0].name]
    assert on_null_gpu("tell(torch.cuda.device_count())", devices=2) == 2


def test_the_device_is_the_one_that_was_asked_for() -> None:
    told = on_null_gpu(
        """
        torch.cuda.set_device(2)
        p = torch.cuda.get_device_properties(2)
        tell([torch.cuda.device_count(), torch.cuda.get_device_name(2), torch.cuda.get_device_capability(),
              p.total_memory, torch.cuda.mem_get_info(), p.multi_processor_count,
              raised(lambda: torch.empty(1, device="cuda:3"))])
        """,
        devices=3,
        memory_gb=180,
        capability=100,
        name="NVIDIA B200",
    )
    assert told[:4] == [3, "NVIDIA B200 (null)", [10, 0], 180 * GB]
    assert told[4] == [180 * GB, 180 * GB]
    assert told[5] == 148
    assert told[6][0] in ("AcceleratorError", "RuntimeError")
    assert "invalid device ordinal" in told[6][1]


def test_memory_ends_at_the_limit_with_torchs_own_error() -> None:
    told = on_null_gpu(
        """
        kept = [torch.empty(10**9, dtype=torch.uint8, device="cuda") for _ in range(9)]
        full = raised(lambda: torch.empty(10**9, dtype=torch.uint8, device="cuda"))
        kept.pop()
        again = torch.empty(10**9, dtype=torch.uint8, device="cuda")
        tell([full, len(kept)])
        """,
        memory_gb=9.5,
    )
    (kind, message), kept = told
    assert kind == "OutOfMemoryError"
    assert "CUDA out of memory. Tried to allocate 954.00 MiB. GPU 0 has a total capacity of 8.85 GiB" in message
    assert "this process has" in message
    assert kept == 8


# torch's allocator rounds to 512 bytes. It takes segments of 2 MiB for blocks below 1 MiB, of 20 MiB for those below
# 10 MiB, and of whole 2 MiB above; it keeps the rest of a segment with the block if that is below 1 MiB.
MIB = 2**20


def test_the_allocators_statistics_are_exact() -> None:
    told = on_null_gpu(
        """
        sizes = (1000, 3 * 2**20, 10**9)
        kept = [torch.empty(size, dtype=torch.uint8, device="cuda") for size in sizes]
        s = torch.cuda.memory_stats()
        before = [s["allocated_bytes.all.current"], s["reserved_bytes.all.current"], counters.used_bytes()]
        del kept
        torch.cuda.empty_cache()
        s = torch.cuda.memory_stats()
        tell([before, s["allocated_bytes.all.current"], s["reserved_bytes.all.peak"], counters.used_bytes(),
              counters.read().peak_bytes])
        """
    )
    large = -(-GB // (2 * MIB)) * 2 * MIB
    reserved = 2 * MIB + 20 * MIB + large
    assert large - GB < MIB
    allocated = 1024 + 3 * MIB + large
    assert told == [[allocated, reserved, reserved], 0, reserved, 0, [reserved]]


@pytest.mark.parametrize("setting", ["expandable_segments:True", "backend:cudaMallocAsync"])
def test_other_allocators_count_against_the_same_limit(setting: str) -> None:
    told = on_null_gpu(
        """
        kept = [torch.empty(10**9, dtype=torch.uint8, device="cuda") for _ in range(7)]
        used = counters.used_bytes()
        full = raised(lambda: torch.empty(2 * 10**9, dtype=torch.uint8, device="cuda"))
        kept[3][:4] = torch.full((4,), 7, dtype=torch.uint8)
        values = kept[3][:4].tolist()
        del kept
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        larger = torch.empty(7 * 10**9, dtype=torch.uint8, device="cuda")
        tell([used, full, values, counters.used_bytes()])
        """,
        memory_gb=8,
        variables={"PYTORCH_CUDA_ALLOC_CONF": setting},
    )
    used, full, values, later = told
    assert 7 * GB <= used < 7 * GB + 8 * 20 * MIB
    assert full[0] == "OutOfMemoryError"
    assert values == [7] * 4
    assert 7 * GB <= later < 7 * GB + 20 * MIB


def test_expandable_segments_use_what_ordinary_ones_leave_in_pieces() -> None:
    code = """
        whole = torch.empty(6 * 10**9, dtype=torch.uint8, device="cuda")
        del whole  # cached: six tensors are cut from it
        kept = [torch.empty(10**9, dtype=torch.uint8, device="cuda") for _ in range(6)]
        kept = kept[::2]  # three holes of 1 GB, and 1 GB that was never taken
        tell(raised(lambda: torch.empty(2 * 10**9, dtype=torch.uint8, device="cuda")))
        """
    ordinary = on_null_gpu(code, memory_gb=7, variables={"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:False"})
    assert ordinary is not None
    assert ordinary[0] == "OutOfMemoryError"
    assert on_null_gpu(code, memory_gb=7, variables={"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}) is None


def test_operations_copies_and_waits_are_counted() -> None:
    told = on_null_gpu(
        """
        from dataclasses import asdict
        a = torch.empty(300, 500, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        b = torch.empty(500, 700, device="cuda", dtype=torch.bfloat16)
        c = torch.empty(8, 30, 50, device="cuda")
        d = torch.empty(8, 50, 70, device="cuda")
        x = torch.arange(1000)
        r = torch.empty(1000, dtype=torch.int64)
        torch.cuda.synchronize()
        start = counters.read()
        y = a @ b
        product = counters.read() - start
        y.backward(y)
        torch.bmm(c, d)
        torch.nn.functional.linear(c, torch.empty(20, 50, device="cuda"), torch.empty(20, device="cuda"))
        products = counters.read() - start
        start = counters.read()
        on_device = x.cuda()
        r.copy_(on_device)
        on_device.clone()
        value = on_device[17].item()
        torch.cuda.synchronize()
        moved = counters.read() - start
        tell([asdict(product), asdict(products), asdict(moved), r.tolist(), value])
        """
    )
    product, products, moved, values, value = told
    one = 2 * 300 * 500 * 700
    assert (product["flops"], product["products"]) == (one, 1)
    assert products["flops"] == 2 * one + 8 * 2 * 30 * 50 * 70 + 2 * 8 * 30 * 50 * 20
    assert products["products"] == 4
    assert moved["copies"]["host_to_device"] == {"calls": 1, "bytes": 8000}
    assert moved["copies"]["device_to_host"] == {"calls": 2, "bytes": 8008}
    assert moved["copies"]["device_to_device"] == {"calls": 1, "bytes": 8000}
    assert moved["synchronisations"] == {"stream": 3, "device": 1, "event": 0}
    assert values == list(range(1000))
    assert value == 17


def test_large_copies_are_counted_and_not_made() -> None:
    told = on_null_gpu(
        """
        x = torch.ones(4096, dtype=torch.uint8)
        small, large = x[:1024].cuda(), x.cuda()
        tell([small.cpu().sum().item(), torch.zeros(4096, dtype=torch.uint8).copy_(large).sum().item(),
              counters.read().copies["host_to_device"].bytes])
        """,
        copy_max_bytes=1024,
    )
    assert told == [1024, 0, 5120]


def test_memory_costs_the_host_nothing() -> None:
    told = on_null_gpu(
        """
        def anonymous():
            return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon"))
        torch.empty(1, device="cuda")
        before = anonymous()
        kept = [torch.full((10**9,), 3, dtype=torch.uint8, device="cuda") for _ in range(70)]
        host = [torch.empty(64 << 30, dtype=torch.uint8) for _ in range(2)]  # more than most machines have
        host[0][:3] = 1
        kept[0].copy_(host[0][:10**9])
        grown = anonymous() - before
        del host
        tell(grown)
        """
    )
    assert told < 50_000  # kB


def test_pinned_and_registered_memory_is_known() -> None:
    told = on_null_gpu(
        """
        plain, pinned = torch.empty(1000), torch.empty(1000, pin_memory=True)
        own = torch.empty(1000)
        cudart = torch.cuda.cudart()
        first = cudart.cudaHostRegister(own.data_ptr(), 4000, 0)
        known = own.is_pinned()
        second = cudart.cudaHostRegister(own.data_ptr(), 4000, 0)
        cudart.cudaHostUnregister(own.data_ptr())
        tell([plain.is_pinned(), pinned.is_pinned(), int(first), known, int(second), own.is_pinned()])
        """
    )
    assert told == [False, True, 0, True, 712, False]  # cudaErrorHostMemoryAlreadyRegistered


def test_attention_goes_to_flash_and_no_library_needs_a_driver() -> None:
    told = on_null_gpu(
        """
        q = torch.empty(2, 8, 256, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        out = torch.nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True)
        out.sum().backward()
        tell([type(out.grad_fn).__name__, list(q.grad.shape), counters.stub_calls()])
        """
    )
    assert told == ["ScaledDotProductFlashAttentionBackward0", [2, 8, 256, 64], []]


PLANTED = {
    "device mix": (
        "torch.empty(4, 4, device='cuda') @ torch.empty(4, 4)",
        "RuntimeError",
        "Expected all tensors to be on the same device",
    ),
    "devices": (
        "torch.empty(4, device='cuda:0') + torch.empty(4, device='cuda:1')",
        "RuntimeError",
        "Expected all tensors to be on the same device",
    ),
    "dtype": (
        "torch.empty(4, 4, device='cuda', dtype=torch.bfloat16) @ torch.empty(4, 4, device='cuda')",
        "RuntimeError",
        "expected mat1 and mat2 to have the same dtype",
    ),
    "FP8 size": (
        "torch._scaled_mm(*[torch.empty(24, 24, device='cuda').to(torch.float8_e4m3fn).t()] * 2, "
        "*[torch.ones((), device='cuda')] * 2, out_dtype=torch.bfloat16)",
        "RuntimeError",
        "divisible by 16",
    ),
    "capture": (
        "torch.cuda.graph(torch.cuda.CUDAGraph()).__enter__()",
        "AcceleratorError",
        "operation not supported",
    ),
    "block": (
        "torch.cuda._compile_kernel('__global__ void k(float *x) {}', 'k')((1, 1, 1), (2048, 1, 1), "
        "(torch.empty(4, device='cuda'),))",
        "RuntimeError",
        "invalid argument",
    ),
}


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_error_is_found_with_torchs_own_exception(name: str) -> None:
    code, kind, message = PLANTED[name]
    found = on_null_gpu(f"tell(raised(lambda: {code}))", devices=2)
    assert found is not None
    assert found[0] == kind
    assert message in found[1]


def test_an_fp8_product_that_cublaslt_does_not_have_is_not_supported() -> None:
    """Sizes by the requirements in its documentation; 0 is success, 15 CUBLAS_STATUS_NOT_SUPPORTED."""
    told = on_null_gpu(
        """
        import ctypes
        from ctypes import byref, c_char, c_int, c_int64, c_uint64, c_void_p
        lt = ctypes.CDLL(None)
        E4M3, E5M2, BF16, FP32, COMPUTE_32F, OP_T = 28, 29, 14, 0, 68, c_int(1)
        def layout(kind, rows, cols):
            made = c_void_p()
            lt.cublasLtMatrixLayoutCreate(byref(made), kind, c_uint64(rows), c_uint64(cols), c_int64(rows))
            return made
        def status(m, n, k, a=E4M3, b=E4M3, transposed=True):
            operation = c_void_p()
            lt.cublasLtMatmulDescCreate(byref(operation), COMPUTE_32F, FP32)
            if transposed:
                lt.cublasLtMatmulDescSetAttribute(operation, 3, byref(OP_T), ctypes.sizeof(OP_T))
            A, D = layout(a, k, m) if transposed else layout(a, m, k), layout(BF16, m, n)
            found, results = c_int(), (c_char * 4096)()
            return lt.cublasLtMatmulAlgoGetHeuristic(
                None, operation, A, layout(b, k, n), D, D, None, 1, results, byref(found))
        tell([status(32, 5, 64), status(32, 5, 72), status(8, 16, 64), status(12, 16, 64),
              status(32, 32, 64, transposed=False), status(32, 32, 64, E5M2, E4M3), status(32, 32, 64, E5M2, E5M2),
              status(12, 5, 7, BF16, BF16)])
        """
    )
    assert told == [0, 15, 0, 15, 15, 0, 15, 0]


def test_a_triton_kernel_is_compiled_for_the_gpu_and_launched(tmp_path: Path) -> None:
    source = tmp_path / "kernel.py"
    source.write_text(
        """\
import triton
import triton.language as tl

@triton.jit
def add(x, y, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + i, tl.load(x + i, mask=i < n) + 1, mask=i < n)
"""
    )
    told = on_null_gpu(
        f"""
        sys.path.insert(0, {str(tmp_path)!r})
        from kernel import add
        x = torch.zeros(1000, device="cuda")
        done = add[(4,)](x, x, 1000, BLOCK=256)
        tell([".target sm_90" in done.asm["ptx"], len(done.asm["cubin"]) > 1000, counters.read().triton_launches,
              x.sum().item(), raised(lambda: add[(4,)](x, torch.zeros(1000), 1000, BLOCK=256))])
        """
    )
    assert told[:4] == [True, True, 1, 0]
    assert told[4][0] == "ValueError"
    assert "cannot be accessed from Triton (cpu tensor?)" in told[4][1]


def test_programs_that_go_past_the_runtime_get_the_same_device() -> None:
    """By NVIDIA's Python bindings of the driver, which torch depends on."""
    told = on_null_gpu(
        """
        from cuda.bindings import driver as cu
        def check(answer):
            if answer[0] != cu.CUresult.CUDA_SUCCESS:
                raise RuntimeError(answer[0].name)
            return answer[1] if len(answer) == 2 else answer[1:]
        check(cu.cuInit(0))
        context = check(cu.cuDevicePrimaryCtxRetain(1))
        check(cu.cuCtxPushCurrent(context))
        at = check(cu.cuMemAlloc(3 << 20))
        used = [counters.used_bytes(0), counters.used_bytes(1)]
        data, back = bytes(range(100)), bytearray(100)
        check(cu.cuMemcpyHtoD(at, data, 100))
        check(cu.cuMemcpyDtoH(back, at, 100))
        full = raised(lambda: check(cu.cuMemAlloc(2 * 10**9)))
        check(cu.cuMemFree(at))
        twice = raised(lambda: check(cu.cuMemFree(at)))
        event = check(cu.cuEventCreate(0))
        check(cu.cuEventRecord(event, 0))
        check(cu.cuCtxPopCurrent())
        tell([used, list(back) == list(data), full, twice, check(cu.cuEventElapsedTime(event, event)),
              counters.used_bytes(1), int(check(cu.cuCtxGetDevice())), raised(lambda: check(cu.cuCtxPopCurrent())),
              raised(lambda: check(cu.cuStreamBeginCapture(0, cu.CUstreamCaptureMode(0)))), counters.stub_calls()])
        """,
        devices=2,
        memory_gb=2,
    )
    assert told[0] == [0, 4 * MIB]
    assert told[1] is True
    assert told[2][1] == "CUDA_ERROR_OUT_OF_MEMORY"
    assert told[3][1] == "CUDA_ERROR_INVALID_VALUE"
    assert told[4:7] == [1.0, 0, 0]
    assert told[7][1] == "CUDA_ERROR_INVALID_CONTEXT"
    assert told[8][1] == "CUDA_ERROR_NOT_SUPPORTED"
    assert told[9] == []


def test_memory_of_another_process_has_its_size_and_is_counted_once() -> None:
    told = on_null_gpu(
        """
        import torch.multiprocessing as mp, subprocess, base64, pickle
        from torch.multiprocessing.reductions import reduce_tensor
        x = torch.empty(10**8, dtype=torch.uint8, device="cuda")
        rebuild, arguments = reduce_tensor(x)
        own = raised(lambda: rebuild(*arguments))
        child = '''
        import sys, base64, pickle, torch
        from megatron_tempo.nullgpu import counters
        rebuild, arguments = pickle.loads(base64.b64decode(sys.argv[1]))
        y = rebuild(*arguments)
        print(tuple(y.shape), y.device, counters.used_bytes())
        '''
        import textwrap
        packed = base64.b64encode(pickle.dumps((rebuild, arguments)))
        done = subprocess.run([sys.executable, "-c", textwrap.dedent(child), packed], capture_output=True, text=True)
        tell([own, done.stdout, done.stderr])
        """
    )
    own, out, error = told
    assert own[0] == "AcceleratorError"
    assert "invalid device context" in own[1]
    assert out == "(100000000,) cuda:0 0\n", error


def test_a_stub_that_is_called_is_told(tmp_path: Path) -> None:
    log = tmp_path / "stubs.txt"
    told = on_null_gpu(
        """
        import ctypes
        for _ in range(2):
            ctypes.CDLL(None).cudaGraphLaunch(None, None)
        ctypes.CDLL("libcuda.so.1").cuMemAdvise_v2(None, None)
        ctypes.CDLL(None).cudaProfilerStart()
        tell(counters.stub_calls())
        """,
        stub_log=log,
    )
    assert told == ["cudaGraphLaunch", "cuMemAdvise_v2"]
    assert log.read_text() == "cudaGraphLaunch\ncuMemAdvise_v2\n"


def test_the_driver_does_not_load_without_the_library_that_names_it() -> None:
    code = "import ctypes\nctypes.CDLL('libcuda.so.1')"
    variables = environment()
    assert run(code, variables).returncode == 0
    without = run(code, variables | {"LD_PRELOAD": ""})
    assert "libcuda.so.1: undefined symbol" in without.stderr


@pytest.mark.parametrize("marked", [True, False])
def test_it_is_impossible_to_train_on_it(tmp_path: Path, marked: bool) -> None:
    """With the environment of a rehearsal, and with an LD_PRELOAD by hand of a renamed copy."""
    variables = environment()
    if not marked:
        copy = tmp_path / "other.so"
        copy.write_bytes(Path(variables["LD_PRELOAD"]).read_bytes())
        plain = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
        variables = plain | {"LD_PRELOAD": str(copy)}
    code = (
        f"import os; os.chdir({str(tmp_path)!r})\nfrom megatron_tempo import cli\n"
        "codes = [cli.main(['train', 'experiment=quickstart'])]\n"
        "from megatron_tempo.config.choices import Device\nfrom megatron_tempo.errors import InputError\n"
        "from megatron_tempo.models.device import select_device\n"
        "try: select_device(Device.auto, 0)\nexcept InputError as error: codes.append(str(error))\n"
        "import torch; torch.cuda.is_available(); print(codes)"
    )
    done = run(code, variables)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("[2, 'run.device=auto: this process has the null GPU")
    assert "error: train: this process has the null GPU" in done.stderr
    assert ("*** NULL GPU" in done.stderr) != marked
    assert [path for path in tmp_path.iterdir() if path.name != "other.so"] == []
