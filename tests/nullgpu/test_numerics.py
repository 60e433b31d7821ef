"""What torch, Transformer Engine and NCCL choose and count on a GPU. None of it needs one that computes anything."""

from __future__ import annotations

import importlib.util

import pytest

from megatron_tempo.config.choices import Precision
from megatron_tempo.config.rules.precision import Machine, check_machine
from megatron_tempo.config.schema import Config
from tests.nullgpu.child import on_null_gpu

pytestmark = pytest.mark.nullgpu

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
    before, after, workspace, tf32 = on_null_gpu(CODE, variables=variables)
    assert before["torch.bfloat16"] == ["CUDNN_ATTENTION", "CUDNN_ATTENTION"], (
        "if torch no longer does, say so in gpu.md"
    )
    assert after["torch.bfloat16"] == ["FLASH_ATTENTION", "EFFICIENT_ATTENTION"]
    assert before["torch.float32"] == after["torch.float32"] == ["EFFICIENT_ATTENTION", "EFFICIENT_ATTENTION"]
    assert workspace == ":4096:8"
    assert tf32 == [False, False]


BACKENDS = """
from transformer_engine.pytorch.attention.dot_product_attention import utils

found = {}
for deterministic in (False, True):
    for training in (False, True):
        flash, _, fused, _, unfused, _ = utils.get_attention_backend(utils.AttentionParams(
            qkv_type=torch.Tensor, qkv_dtype=torch.bfloat16, qkv_layout="thd_thd_thd", batch_size=2, num_heads=32,
            num_gqa_groups=8, max_seqlen_q=4096, max_seqlen_kv=4096, head_dim_qk=128, head_dim_v=128,
            attn_mask_type="padding_causal", window_size=(-1, 0), core_attention_bias_requires_grad=False,
            deterministic=deterministic, is_training=training))
        assert not flash
        found[f"{deterministic} {training}"] = bool(unfused)
tell([found[f"{deterministic} True"] or found[f"{deterministic} False"] for deterministic in (False, True)])
"""


@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (9, 0), (10, 0)])
def test_the_rule_on_flash_attn_is_transformer_engine_s_own_choice(capability: tuple[int, int]) -> None:
    pytest.importorskip("transformer_engine.pytorch")
    if importlib.util.find_spec("flash_attn") is not None:
        pytest.skip("with flash-attn installed it has another choice")
    unfused = on_null_gpu(BACKENDS, capability=10 * capability[0] + capability[1])
    for deterministic, expected in zip((False, True), unfused, strict=True):
        config = Config()
        config.run.precision, config.run.deterministic = Precision.bf16, deterministic
        refused = list(check_machine(config, Machine("GPU", capability, (13, 0), (2, 11))))
        assert bool(refused) == expected, (capability, deterministic)


COLLECTIVES = """
import torch.distributed as dist
from megatron_tempo.models.megatron_compat.torch_private import begun_collectives

dist.init_process_group("cpu:gloo,cuda:nccl", store=dist.HashStore(), rank=0, world_size=1)
group = dist.new_group([0])
before = begun_collectives()
for _ in range(3):
    dist.all_reduce(torch.ones(4, device="cuda"), group=group)
dist.all_reduce(torch.ones(1))
dist.all_reduce(torch.ones(1), group=group)  # of gloo, outside the default group
tell([before, begun_collectives()])
"""


def test_collectives_of_nccl_are_counted() -> None:
    """The watchdog names the rank with the lowest count."""
    before, after = on_null_gpu(COLLECTIVES)
    assert before == {"0 cuda": 0, "0 cpu": 0, "1 cuda": 0}
    assert after == {"0 cuda": 0, "0 cpu": 1, "1 cuda": 3}
