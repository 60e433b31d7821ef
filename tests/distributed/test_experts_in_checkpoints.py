"""A mixture of experts in Megatron's checkpoints: Megatron's own model reads what we write, and we what it writes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn

from megatron_tempo.checkpoint.convert import to_hugging_face, to_megatron
from megatron_tempo.config.model_shape import read_model_shape
from megatron_tempo.config.pipeline_layers import PipelineLayers
from megatron_tempo.config.schema import ParallelConfig
from megatron_tempo.config.sizes import padded_vocab
from megatron_tempo.models.megatron_compat.cpu_backend import install_cpu_backend
from megatron_tempo.models.parallel import Layout, parallel_groups
from megatron_tempo.weights import tables
from tests.support.ranks import run_ranks
from tests.support.tiny import write_model
from tests.support.weights import tensors

# tensor, expert tensor, expert, pipeline, processes
LAYOUTS = {"tp2-etp1-ep2-pp2": (2, 1, 2, 2, 4), "tp1-etp2-ep2": (1, 2, 2, 1, 4)}


def megatrons_model(folder: Path, layout: Layout) -> GPTModel:
    """Megatron's own Qwen3-MoE, of its own spec."""
    shape = read_model_shape(folder)
    assert shape.experts is not None
    config = TransformerConfig(
        num_layers=shape.layers,
        hidden_size=shape.hidden,
        num_attention_heads=shape.heads,
        num_query_groups=shape.groups,
        kv_channels=shape.head_dim,
        ffn_hidden_size=shape.ffn,
        moe_ffn_hidden_size=shape.experts.ffn,
        num_moe_experts=shape.experts.count,
        moe_router_topk=shape.experts.per_token,
        moe_token_dispatcher_type="allgather",  # no tokens are sent here; "alltoall" makes a CUDA stream
        tensor_model_parallel_size=layout.tensor,
        pipeline_model_parallel_size=layout.pipeline,
        expert_model_parallel_size=layout.expert,
        expert_tensor_parallel_size=layout.expert_tensor,
        pipeline_dtype=torch.float32,
        gated_linear_unit=True,
        activation_func=nn.functional.silu,
        add_bias_linear=False,
        normalization="RMSNorm",
        qk_layernorm=True,
        use_cpu_initialization=True,
        bias_activation_fusion=False,
        gradient_accumulation_fusion=False,
    )
    spec = get_gpt_layer_local_spec(num_experts=shape.experts.count, qk_layernorm=True, normalization="RMSNorm")
    spec.submodules.sharded_state_dict_keys_map = {}  # ours are the norms' own names
    return GPTModel(
        config,
        spec,
        vocab_size=padded_vocab(shape.vocab, layout.tensor),
        max_sequence_length=shape.max_positions,
        pre_process=layout.is_first_stage,
        post_process=layout.is_last_stage,
        share_embeddings_and_output_weights=False,
        position_embedding_type="rope",
    )


def read_and_write(folder: Path, converted: Path, saved: Path, *sizes: int) -> list[str]:
    """Load a checkpoint into Megatron's model, compare it with the tables' cuts of the folder, and save it again."""
    install_cpu_backend()
    tensor, expert_tensor, expert, pipeline = sizes
    parallel = ParallelConfig(tensor=tensor, pipeline=pipeline, expert=expert, expert_tensor=expert_tensor)
    with parallel_groups(parallel, torch.device("cpu"), 0) as layouts:
        layout = layouts.actor
        net = megatrons_model(folder, layout)
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.fill_(7.0)
        metadata = {"dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}
        wanted = {"model": net.sharded_state_dict(metadata=metadata)}
        net.load_state_dict(dist_checkpointing.load(wanted, str(converted), strict="raise_all")["model"])
        different = differing(net, folder, layout)
        if layout.rank == 0:
            saved.mkdir()
        torch.distributed.barrier()
        dist_checkpointing.save({"model": net.sharded_state_dict(metadata=metadata)}, str(saved))
        return different


def differing(net: GPTModel, folder: Path, layout: Layout) -> list[str]:
    """The parameters of this rank whose bits are not the tables' cut of the folder's tensors."""
    shape = read_model_shape(folder)
    stages = PipelineLayers(layout.pipeline)
    whole = {name: tensor for bucket in tensors(folder) for name, tensor in bucket}
    named = {name.replace("local_experts.", ""): parameter for name, parameter in net.named_parameters()}
    held = {
        mapping.megatron: mapping.sharding.shard(
            [whole[name] for name in mapping.names],
            *(layout.tensor_rank, layout.tensor)
            if mapping.expert_rank is None
            else (layout.expert_tensor_rank, layout.expert_tensor),
        )
        for mapping in tables.mappings(shape, stages, critic=False, expert_ranks=layout.expert)
        if mapping.stage == layout.pipeline_rank and mapping.expert_rank in (None, layout.expert_rank)
    }
    assert held.keys() == named.keys()
    return [name for name, cut in held.items() if not torch.equal(cut, named[name])]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_megatrons_model_reads_and_writes_the_same_checkpoints(tmp_path: Path, layout: str) -> None:
    folder = write_model(tmp_path / "folder", family="qwen3_moe", layers=2)
    to_megatron(folder, tmp_path / "megatron", "actor", 50_000)
    *sizes, world = LAYOUTS[layout]
    given = folder, tmp_path / "megatron", tmp_path / "saved"
    assert run_ranks(read_and_write, world, tmp_path / "ranks", *given, *sizes) == [[]] * world
    to_hugging_face(tmp_path / "saved", tmp_path / "back", "actor", folder, None, 50_000)
    before, after = (
        {name: one for bucket in tensors(of) for name, one in bucket} for of in (folder, tmp_path / "back")
    )
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
