"""The kernels' machine code for Hopper (sm_90a): registers, spills, width of the loads.

They are compiled ahead of time, in a process without Triton's interpreter; no GPU is needed.
"""

from __future__ import annotations

import hashlib
import os
import pickle
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from tests.support.hopper import Compiled

# The most registers a thread may take. A multiprocessor has 65,536 and 2,048 threads; the matrix kernels keep 128
# accumulators a thread and have it to themselves.
REGISTERS = {
    "advantages._moments": 64,
    "policy_loss._forward": 128,
    "policy_loss._backward": 64,
    "policy_loss._finish": 64,
    "value_loss._shift": 64,
    "value_loss._forward": 64,
    "value_loss._backward": 64,
    "logprobs._summed": 48,
    "logprobs._join": 64,
    "logprobs._gradient": 64,
    "linear_logprobs._summed": 255,
    "linear_logprobs._gradient": 255,
}
SHARED = 227 * 1024  # bytes that a program may have

ROOT = Path(__file__).parents[2]
# What the machine code depends on besides the kernels and Triton.
COMPILERS = ("megatron_tempo/config/method_settings.py", "tests/support/compile_kernels.py", "tests/support/hopper.py")


@pytest.fixture(scope="module")
def compiled() -> dict[str, list[Compiled]]:
    """Compiled in a minute, and kept in .cache/ under the hash of everything that it is made of."""
    sources = [*(ROOT / "megatron_tempo/kernels").glob("*.py"), *map(ROOT.joinpath, COMPILERS)]
    digest = hashlib.sha256(version("triton").encode())
    for path in sorted(sources):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    out = ROOT / ".cache/kernels" / f"{digest.hexdigest()}.pkl"
    if not out.exists():
        out.parent.mkdir(parents=True, exist_ok=True)
        partial = out.with_suffix(f".{os.getpid()}")
        environment = os.environ | {"TRITON_INTERPRET": "0"}
        command = [sys.executable, "-m", "tests.support.compile_kernels", str(partial)]
        done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        partial.rename(out)
    return pickle.loads(out.read_bytes())


def of(compiled: dict[str, list[Compiled]], kernel: str, case: str = "") -> list[Compiled]:
    matching = [one for name, many in compiled.items() if name.startswith(case) for one in many if one.name == kernel]
    assert matching
    return matching


def test_every_kernel_is_there(compiled: dict[str, list[Compiled]]) -> None:
    assert {one.name for many in compiled.values() for one in many} == REGISTERS.keys()


@pytest.mark.parametrize("kernel", REGISTERS)
def test_nothing_spills_and_registers_and_shared_memory_suffice(
    compiled: dict[str, list[Compiled]], kernel: str
) -> None:
    for one in of(compiled, kernel):
        assert one.spills == one.stack == 0
        assert one.registers <= REGISTERS[kernel]
        assert one.shared <= SHARED


def test_the_policy_loss_is_two_launches_and_one_to_whiten(compiled: dict[str, list[Compiled]]) -> None:
    for ratio in ("sequence", "token"):
        plain = [one.name for one in compiled[f"policy {ratio} plain"]]
        assert plain == ["policy_loss._forward", "policy_loss._backward"]
        whitened = [one.name for one in compiled[f"policy {ratio} all"]][:3]
        assert whitened == ["advantages._moments", "policy_loss._forward", "policy_loss._backward"]


def test_the_value_loss_is_two_launches_and_three_with_its_clip(compiled: dict[str, list[Compiled]]) -> None:
    assert [one.name for one in compiled["value"]] == ["value_loss._forward", "value_loss._backward"]
    clipped = [one.name.rpartition("_")[2] for one in compiled["value clip"]]
    assert clipped == ["shift", "forward", "backward"]


@pytest.mark.parametrize("case", ["logits bf16", "logits fp32"])
def test_logits_are_read_and_written_16_bytes_at_a_time(compiled: dict[str, list[Compiled]], case: str) -> None:
    """In the loop over the columns. What is behind the last whole turn of it is read one by one."""
    loads = 2 if case == "logits bf16" else 4  # a thread's 16 columns of a turn
    for one in of(compiled, "logprobs._summed", case):
        assert one.count("LDG.E.128") == loads
    for one in of(compiled, "logprobs._gradient", case):
        assert one.count("LDG.E.128") == loads
        assert one.count("STG.E.128") >= loads
        assert one.count("STG.E.U8") == one.count("STG.E.U16") == 0


def test_the_loop_over_logits_waits_for_no_other_thread(compiled: dict[str, list[Compiled]]) -> None:
    """All barriers stand behind the last load of logits: threads meet when the row is read, not before."""
    for one in of(compiled, "logprobs._summed"):
        code = one.sass.splitlines()
        barriers = [i for i, line in enumerate(code) if "BAR.SYNC" in line]
        exponentials = [i for i, line in enumerate(code) if "LDG.E.128" in line]
        assert barriers
        assert max(exponentials) < min(barriers)


def test_bfloat16_is_multiplied_by_the_tensor_cores_and_fetched_by_the_copy_engine(
    compiled: dict[str, list[Compiled]],
) -> None:
    """wgmma (HGMMA) of 64 x 256 x 16, four a step of 64, fed by bulk tensor copies (UTMALDG); no older instruction."""
    for kernel in ("linear_logprobs._summed", "linear_logprobs._gradient"):
        for one in of(compiled, kernel, "linear bf16"):
            assert one.count("HGMMA.64x256x16.F32.BF16") == 4
            assert one.count("HMMA") == 0
            assert one.count("UTMALDG") >= 4
            assert one.count("LDG.E.128") == 0
    for one in of(compiled, "linear_logprobs._gradient", "linear bf16"):
        assert one.count("UTMASTG") == 1
