"""What torch chooses on a Hopper GPU before and after `set_cuda_numerics`. It chooses without computing anything."""

from __future__ import annotations

from typing import Any

import pytest

pytestmark = pytest.mark.nullgpu
child: Any = pytest.importorskip("tests.nullgpu.child")

CODE = """
from torch.nn.attention import SDPBackend
from torch.nn.attention.bias import causal_lower_right
from megatron_tempo.models.device import set_cuda_numerics

def chosen():
    found = {}
    for dtype in (torch.bfloat16, torch.float32):
        x = torch.zeros(1, 8, 512, 128, device="cuda", dtype=dtype)
        mask = torch.zeros(512, 512, device="cuda", dtype=dtype)
        causal = torch._fused_sdp_choice(x, x, x, None, 0.0, True)
        windowed = torch._fused_sdp_choice(x, x, x, mask, 0.0, False)
        found[str(dtype)] = [SDPBackend(causal).name, SDPBackend(windowed).name]
    return found

torch.backends.cuda.enable_cudnn_sdp(True)  # as in a process that nobody has prepared
before = chosen()
set_cuda_numerics(deterministic=True)
tf32 = [torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32]
tell([before, chosen(), os.environ["CUBLAS_WORKSPACE_CONFIG"], tf32])
"""


def test_attention_is_flash_and_fp32_is_fp32() -> None:
    variables = {"TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": "1"}  # as in NVIDIA's containers
    before, after, workspace, tf32 = child.on_null_gpu(CODE, variables=variables)
    assert before["torch.bfloat16"] == ["CUDNN_ATTENTION", "CUDNN_ATTENTION"], (
        "if torch no longer does, say so in gpu.md"
    )
    assert after["torch.bfloat16"] == ["FLASH_ATTENTION", "EFFICIENT_ATTENTION"]
    assert before["torch.float32"] == after["torch.float32"] == ["EFFICIENT_ATTENTION", "EFFICIENT_ATTENTION"]
    assert workspace == ":4096:8"
    assert tf32 == [False, False]
