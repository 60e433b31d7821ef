"""How the parts run: on which device, at which sizes, and where they write."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True, slots=True)
class Setting:
    """`device`: "cuda" or "cpu". `seconds`: the part's time limit. `rehearsal`: a rehearsal's JSON, or None."""

    device: str
    small: bool
    out: str
    seconds: float
    rehearsal: str | None = None

    @property
    def folder(self) -> Path:
        return Path(self.out)

    def written(self) -> str:
        """For the command line of a part's process."""
        return json.dumps(asdict(self))

    @classmethod
    def read(cls, text: str) -> Setting:
        return cls(**json.loads(text))


def is_null_gpu() -> bool:
    """Whether this process runs on the null GPU, whose kernels do nothing: comparisons have no meaning there.

    It is a library in place of CUDA's. So this looks at the libraries that the process has loaded, and no option can
    pass a real GPU off as one.
    """
    try:
        maps = Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    return any("nullgpu" in Path(line.split()[-1]).name for line in maps.splitlines() if line.count("/"))
