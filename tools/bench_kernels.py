"""Compare the kernels with eager PyTorch, torch.compile and liger-kernel: python tools/bench_kernels.py

All variants get the same inputs in one run. Before it is timed, each is compared with the plain functions in float64
(large products: float32). `x ours` is a time relative to ours; `x floor` is relative to the lower bound that the
machine's measured ceilings give:

    policy, value   every input read once and every result written once, at the bandwidth of a copy
    logprobs        the logits read once; with the backward pass read twice and written once
    linear          2 T V h operations, with the backward pass 8 T V h, at the rate of a matrix product

`eager` is the plain function of `megatron_tempo.kernels`. bench_operations.py describes `compile` and `liger`. A time
is that of one call from Python while the GPU is idle. `graph` is the replay of a captured CUDA graph, without launches.

TFLOP/s count the operations of the variant: 6 T V h with the backward pass if it computes logits once. The floor is the
same for all variants. Memory is the peak in addition to the memory before the call; `w/o results` does not count what
the call returns.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path

import torch
from bench_operations import OPERATIONS, Call, Operation, Setup, Variant, size
from torch import Tensor

from megatron_tempo.nullgpu.guard import is_loaded

WARMUP, LEAST, BUDGET = 3, 5, 2.0  # untimed calls; minimum of timed calls; seconds after which no more are made
SAMPLE = 256  # tokens that are compared if tokens are independent and there are too many to compare all
LARGE = 1e12  # operations from which products are compared in float32
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}  # relative to the largest entry
COLUMNS = "operation", "tokens", "pass", "variant", "time", "x ours", "x floor", "peak", "w/o results", "TFLOP/s"
LAYOUT = "{:9}{:>9}  {:17}{:17}{:>10} {:>8} {:>8} {:>10} {:>15} {:>8}"


@dataclass(frozen=True, slots=True)
class Row:
    operation: str
    tokens: int
    backward: bool
    variant: str
    seconds: float | None = None
    to_ours: float | None = None
    to_floor: float | None = None
    peak_bytes: int | None = None
    beside_results_bytes: int | None = None
    tflops: float | None = None
    note: str = ""


@dataclass(slots=True)
class Bound:
    """A variant bound to a set of inputs, to be called repeatedly."""

    variant: Variant
    given: list[Tensor]  # never written to
    backward: bool
    overwritten: bool  # some variants overwrite the first input
    taken: list[Tensor] = field(init=False)  # the inputs of the call
    upstream: list[Tensor] = field(init=False, default_factory=list)  # gradients of its outputs

    def __post_init__(self) -> None:
        self.taken = [x.clone() if self.overwritten and i == 0 else x.detach() for i, x in enumerate(self.given)]
        for x in self.taken[: self.variant.leaves]:
            x.requires_grad_(self.backward)
        if self.backward:
            outputs = [x for x in self.variant.call(*self.taken) if x.requires_grad]
            # A scalar output is the loss itself, which liger checks for.
            self.upstream = [torch.rand_like(x) + 0.5 if x.dim() else torch.ones_like(x) for x in outputs]

    def fresh(self) -> Callable[[], list[Tensor]]:
        """The call, with its inputs restored."""
        if self.overwritten:
            with torch.no_grad():
                self.taken[0].copy_(self.given[0])
        return self.call

    def call(self) -> list[Tensor]:
        return results(self.variant.call, self.taken, self.upstream)


def results(call: Call, taken: list[Tensor], upstream: list[Tensor]) -> list[Tensor]:
    """The outputs and, if `upstream` has their gradients, the gradients of the inputs that require one."""
    outputs = call(*taken)
    if not upstream:
        return list(outputs)
    leaves = [x for x in taken if x.requires_grad]
    return [*outputs, *torch.autograd.grad([x for x in outputs if x.requires_grad], leaves, upstream)]


def error_of(bound: Bound, operation: Operation) -> float:
    """The largest difference from the exact results, relative to the largest entry."""
    got, given, upstream = bound.fresh()(), bound.given, bound.upstream
    if operation.logits:
        at = torch.linspace(0, len(given[0]) - 1, min(len(given[0]), SAMPLE), dtype=torch.float64).long()
        got, given, upstream = ([x[at.to(x.device)] for x in tensors] for tensors in (got, given, upstream))
    wide = torch.float32 if bound.variant.operations[0] > LARGE else torch.float64
    taken = [x.to(wide) if x.is_floating_point() else x for x in given]
    for x in taken[: bound.variant.leaves]:
        x.requires_grad_(bound.backward)
    exact = results(bound.variant.exact, taken, [x.to(wide) for x in upstream])
    pairs = zip(got, exact, strict=True)
    errors = [(x.to(y.dtype) - y).abs().max() / y.abs().max().clamp(min=1e-30) for x, y in pairs]
    return torch.stack(errors).max().item()  # NaN if any is NaN


def measured(operation: Operation, row: Row, variant: Variant, graph: bool, setup: Setup, rate: float) -> Row:
    if variant.missing:
        return replace(row, note=variant.missing)
    overwritten = operation.logits and row.backward
    try:
        bounds = [Bound(variant, variant.convert(x), row.backward, overwritten) for x in operation.sets]
        error = error_of(bounds[0], operation)
        if not error <= TOLERANCE[bounds[0].given[0].dtype]:
            return replace(row, note=f"wrong: max error {error:.1e}")
        peak, without_results = memory(bounds[0]) if setup.cuda and not graph else (None, None)
        calls = map(Bound.fresh, itertools.cycle(bounds))
        seconds = graph_seconds(bounds, setup) if graph else median_seconds(calls, setup)
    except Exception as error:  # noqa: BLE001 (an error of a compiler or out of memory is this row's result)
        return failed(row, error)
    to_floor = seconds * rate / operation.floor[row.backward]
    tflops = variant.operations[row.backward] / seconds / 1e12 or None
    row = replace(row, seconds=seconds, to_floor=to_floor, tflops=tflops)
    return replace(row, peak_bytes=peak, beside_results_bytes=without_results)


def failed(row: Row, error: Exception) -> Row:
    return replace(row, note=f"failed: {type(error).__name__}: {str(error).strip().partition(chr(10))[0][:80]}")


def median_seconds(calls: Iterable[Callable[[], object]], setup: Setup) -> float:
    times: list[float] = []
    begin = time.perf_counter()
    for call in itertools.islice(calls, WARMUP + setup.repeats):
        times.append(one_call(call, setup))
        if len(times) >= WARMUP + LEAST and time.perf_counter() - begin > BUDGET:
            break
    return statistics.median(times[WARMUP:])


def one_call(call: Callable[[], object], setup: Setup) -> float:
    if not setup.cuda:
        begin = time.perf_counter()
        call()
        return time.perf_counter() - begin
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def graph_seconds(bounds: list[Bound], setup: Setup) -> float:
    """Seconds per set of one graph that calls all sets, so that the sets share the cost of the graph's launch."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # capturing requires one call before, on another stream
        for bound in bounds:
            bound.call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = [bound.call() for bound in bounds]  # kept, so that all sets write to different memory
    return median_seconds(itertools.repeat(graph.replay), setup) / len(kept)


def memory(bound: Bound) -> tuple[int, int]:
    """Peak bytes minus those before the call, and minus those after the call."""
    call = bound.fresh()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    kept = call()
    torch.cuda.synchronize()
    peak, after = torch.cuda.max_memory_allocated(), torch.cuda.memory_allocated()
    del kept
    return peak - before, peak - after


def ceilings(setup: Setup) -> tuple[float, float]:
    """Bytes per second of a copy (read and written), and operations per second of a matrix product, on random data."""
    source = setup.uniform(1 << (28 if setup.cuda else 25))
    target = torch.empty_like(source)
    bandwidth = 2 * size([source]) / median_seconds(itertools.repeat(lambda: target.copy_(source)), setup)
    n = 8192 if setup.cuda else 1024
    left, right = setup.normal(n, n), setup.normal(n, n)
    return bandwidth, 2 * n**3 / median_seconds(itertools.repeat(lambda: left @ right), setup)


def printed(row: Row) -> str:
    def number(x: float | None, form: str, scale: float = 1.0) -> str:
        return "-" if x is None else form.format(x / scale)

    fields = [row.operation, row.tokens, "forward+backward" if row.backward else "forward", row.variant]
    if row.note:
        return LAYOUT.format(*fields, *[""] * 6).rstrip().ljust(54) + "  " + row.note
    seconds = ("{:.1f} us", 1e-6) if (row.seconds or 1) < 1e-3 else ("{:.1f} ms", 1e-3)
    fields += [number(row.seconds, *seconds), number(row.to_ours, "{:.2f}"), number(row.to_floor, "{:.2f}")]
    fields += [number(x, "{:.3f} GiB", 2**30) for x in (row.peak_bytes, row.beside_results_bytes)]
    return LAYOUT.format(*fields, number(row.tflops, "{:.3g}"))


def compared(
    name: str, tokens: int, setup: Setup, rates: tuple[float, float], without: frozenset[str] = frozenset()
) -> Iterator[Row]:
    """The rows of an operation at one size. `without`: names of variants that are left out."""
    torch.manual_seed(0)
    torch.compiler.reset()
    try:
        operation = OPERATIONS[name][0](tokens, setup)
    except RuntimeError as error:  # out of memory
        yield failed(Row(name, tokens, False, "(inputs)"), error)
        return
    graphs = [False, True] if setup.cuda and name in ("policy", "value") else [False]
    for backward, graph in itertools.product([False, True], graphs):
        ours = None
        for variant in operation.variants:
            if variant.name in without:
                continue
            row = Row(name, tokens, backward, variant.name + (" graph" if graph else ""))
            row = measured(operation, row, variant, graph, setup, rates[name == "linear"])
            if variant is operation.variants[0]:
                ours = row.seconds
            yield replace(row, to_ours=row.seconds / ours) if row.seconds and ours else row
            if setup.cuda:
                torch.cuda.empty_cache()


def main() -> None:
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", help="sizes, for all operations")
    parser.add_argument("--vocab", type=int, default=151_936 if cuda else 8192)
    parser.add_argument("--hidden", type=int, default=4096 if cuda else 256)
    parser.add_argument("--only", nargs="+", choices=list(OPERATIONS), default=list(OPERATIONS), metavar="NAME")
    parser.add_argument("--repeats", type=int, default=50 if cuda else 5, help="maximum; the median is reported")
    parser.add_argument("--json", type=Path, metavar="FILE", help="append the run to FILE, as one line")
    asked = parser.parse_args()
    if is_loaded():
        parser.error("this process has the null GPU, which computes nothing: unset LD_PRELOAD")
    dtype = torch.bfloat16 if cuda else torch.float32
    packages = ("torch", "triton", "liger-kernel")
    versions = {x: version(x) if importlib.util.find_spec(x.replace("-", "_")) else "none" for x in packages}
    no_liger = "not run: not installed" if versions["liger-kernel"] == "none" else "" if cuda else "not run: needs CUDA"
    device = torch.device("cuda" if cuda else "cpu")
    setup = Setup(device, cuda, dtype, asked.vocab, asked.hidden, asked.repeats, no_liger)
    if not cuda:
        print("No GPU: this runs the reference path on a CPU, at small sizes. It measures none of the targets.\n")
    machine = torch.cuda.get_device_name() if cuda else f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    rates = ceilings(setup)
    print(machine, *(f"{name} {number}" for name, number in versions.items()), sep=", ")
    print(f"copy {rates[0] / 1e9:.1f} GB/s, read and written; matrix product {rates[1] / 1e12:.3g} TFLOP/s, {dtype}")
    print(f"logprobs and linear: vocabulary {setup.vocab}, hidden size {setup.hidden}\n")
    print(LAYOUT.format(*COLUMNS))
    rows = []
    for name in asked.only:
        for tokens in asked.tokens or OPERATIONS[name][1][cuda]:
            for row in compared(name, tokens, setup, rates):
                rows.append(asdict(row))
                print(printed(row), flush=True)
    if asked.json:
        record = {"machine": machine, "versions": versions, "dtype": str(dtype), "vocab": setup.vocab}
        record |= {"hidden": setup.hidden, "copy_bytes_per_second": rates[0]}
        record |= {"matrix_operations_per_second": rates[1], "rows": rows}
        with asked.json.open("a") as file:
            file.write(json.dumps(record) + "\n")


if __name__ == "__main__":
    main()
