"""The tests that are marked gpu, by pytest; without it, each kernel once (tests/support/run_kernels.py)."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

from gpu_parts.records import Records
from gpu_parts.setting import ROOT, Setting

FOLDERS = ("tests/kernels", "tests/gpu", "tests/distributed/test_cuda_memory.py")
# Minutes long, and run by hand: compute-sanitizer, and fifty steps with each FP8 recipe.
LEFT_OUT = "not sanitizer and not trains_as_bf16"
SMALL = "-k", "plain", "tests/kernels/test_advantages.py"


def run(setting: Setting, records: Records) -> None:
    has_pytest = importlib.util.find_spec("pytest") is not None
    if not has_pytest or not records.has_numbers:
        why = "the null GPU's numbers would fail" if has_pytest else "pytest is not installed"
        records.note("tests", f"not run: {why}; each kernel is launched once, and nothing is compared")
        without_pytest(setting, records)
        return
    junit = setting.folder / "kernel_tests.xml"
    done = subprocess.run([sys.executable, "-m", "pytest", *arguments(setting, junit)], cwd=ROOT, check=False)
    # 5: none was collected that is not left out.
    records.holds("pytest ends with exit status 0", done.returncode == 0, str(done.returncode))
    if junit.exists():
        of_tests(junit, records)


def arguments(setting: Setting, junit: Path) -> list[str]:
    plugins = [name for name in ("xdist", "pytest_timeout") if importlib.util.find_spec(name)]
    words = ["-q", "-ra", f"--junit-xml={junit}", "-p", "no:cacheprovider"]
    words += ["-n0"] if "xdist" in plugins else []
    words += [] if "pytest_timeout" in plugins else ["-W", "ignore::pytest.PytestUnknownMarkWarning"]
    if setting.device == "cpu":
        return [*words, "-m", "not gpu", *SMALL]
    return [*words, "-m", "gpu", "-k", LEFT_OUT, *FOLDERS]


def of_tests(junit: Path, records: Records) -> None:
    """A record for each test that failed or was skipped, and the number of those that passed."""
    passed = 0
    for case in ElementTree.parse(junit).getroot().iter("testcase"):
        name = f"{case.get('classname')}::{case.get('name')}"
        faults = [child for child in case if child.tag in ("failure", "error")]
        skips = [child for child in case if child.tag == "skipped"]
        if faults:
            records.holds(name, False, str(faults[0].get("message"))[:300].replace("\n", " "))
        elif skips:
            records.note(f"{name}: skipped", str(skips[0].get("message")))
        else:
            passed += 1
    records.figure("tests that passed", passed)


def without_pytest(setting: Setting, records: Records) -> None:
    if setting.device == "cpu":
        return
    with records.attempt("run_kernels"):
        from tests.support import run_kernels

        run_kernels.main()
        records.holds("run_kernels: every kernel is launched", True, numeric=False)
