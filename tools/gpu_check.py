"""The first hour on a GPU: one command that runs in ten minutes and says what works there.

    python tools/gpu_check.py                          # on one Hopper GPU; docs/gpu.md explains the result
    python tools/gpu_check.py --only kernels memory
    python tools/gpu_check.py --wheels wheels          # without a network: installs a folder of wheels first
    python tools/gpu_check.py --device cpu             # the same parts at small sizes: shows that the tool works

Each part has a process and a time limit of its own. Exit status: 0 if every part that could run passed, 1 otherwise.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from gpu_parts import catalog, driver
from gpu_parts.setting import Setting
from gpu_parts.wheels import WheelError, make_environment


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", action="store_true", help="print the parts, and do nothing")
    names = [part.name for part in catalog.PARTS]
    parser.add_argument("--only", nargs="+", choices=names, default=[], metavar="PART", help="run these parts only")
    parser.add_argument("--seconds", type=float, default=600.0, help="time limit of all parts together (default 600)")
    words = "factor of each part's own time limit, for a machine that is busy or slow (default 1)"
    parser.add_argument("--patience", type=float, default=1.0, metavar="FACTOR", help=words)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: at small sizes")
    parser.add_argument("--small", action="store_true", help="small sizes on a GPU too")
    words = "new or empty, for logs and results (default runs/gpu-check-TIME)"
    parser.add_argument("--out", type=Path, metavar="FOLDER", help=words)
    parser.add_argument("--wheels", type=Path, metavar="FOLDER", help="install these wheels into FOLDER of --out first")
    parser.add_argument("--rehearsal", type=Path, metavar="FILE", help="JSON of a rehearsal, for the part `memory`")
    return parser


def main(words: list[str] | None = None) -> int:
    asked = arguments().parse_args(words)
    parts = catalog.named(asked.only)
    if asked.list:
        print("\n".join(f"{part.name:13} at most {part.seconds:.0f} s  {part.shows}" for part in parts))
        return 0
    for option, path in (("--rehearsal", asked.rehearsal), ("--wheels", asked.wheels)):
        if path is not None and not path.exists():
            print(f"{option} {path}: there is none", file=sys.stderr)
            return 2
    out = (asked.out or Path(time.strftime("runs/gpu-check-%Y%m%d-%H%M%S"))).resolve()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        print(f"--out {out}: has files already; give a new or an empty folder", file=sys.stderr)
        return 2
    rehearsal = None if asked.rehearsal is None else str(asked.rehearsal.resolve())
    setting = Setting(asked.device, asked.small or asked.device == "cpu", str(out), asked.seconds, rehearsal)
    python = sys.executable
    if asked.wheels is not None:
        try:
            python = make_environment(asked.wheels, out / "venv")
        except (WheelError, OSError) as error:
            print(error, file=sys.stderr)
            return 2
    outcomes = driver.run_parts(parts, setting, asked.seconds, driver.default_command, python, asked.patience)
    print(f"\n{driver.table(outcomes)}\n\n{out / driver.RESULTS}")
    return driver.exit_status(outcomes)


if __name__ == "__main__":
    sys.exit(main())
