"""Makes an environment of sglang-cpu.txt importable without CUDA. To be run by that environment's Python.

SGLang imports torchvision, whose wheel does not load its operators beside a CPU build of torch, and sgl_kernel, which
there is for CUDA alone. Neither is called when it generates.
"""

from __future__ import annotations

import sysconfig
from pathlib import Path

SITE = Path(sysconfig.get_paths()["purelib"])
MARK = "# for SGLang without CUDA"
OPERATORS = f"""

{MARK}
if not _has_ops():
    for _name in ("nms", "qnms"):
        torch.library.define(f"torchvision::{{_name}}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
"""
KERNELS = '''"""Stands in for sgl_kernel: any CPU kernel can be imported, and none can be called."""


def __getattr__(name):
    if not name.endswith("_cpu"):
        raise AttributeError(name)

    def missing(*args, **kwargs):
        raise RuntimeError(f"sgl_kernel.{name} is not there")

    return missing
'''


def main() -> None:
    extension = SITE / "torchvision/extension.py"
    text = extension.read_text()
    if MARK not in text:
        extension.write_text(text + OPERATORS)
    (SITE / "sgl_kernel").mkdir(exist_ok=True)
    (SITE / "sgl_kernel/__init__.py").write_text(KERNELS)


if __name__ == "__main__":
    main()
