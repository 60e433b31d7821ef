"""Weights between Hugging Face's tensors and Megatron's shards, and folders that do not fit."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_tempo.config.choices import Logits, Precision
from megatron_tempo.config.model_shape import FAMILIES, Experts, LayerAttention, ModelShape, read_model_shape
from megatron_tempo.config.pipeline_layers import PipelineLayers
from megatron_tempo.config.rope import Rope
from megatron_tempo.config.schema import ParallelConfig
from megatron_tempo.config.sizes import padded_vocab
from megatron_tempo.errors import InputError
from megatron_tempo.kernels import REFERENCE
from megatron_tempo.models.families import transformer_config
from megatron_tempo.models.gpt import LanguageModel, PackedGPT, ValueModel
from megatron_tempo.models.megatron_compat.cpu_backend import install_cpu_backend
from megatron_tempo.models.parallel import Layout, parallel_groups
from megatron_tempo.weights import folder, tables
from megatron_tempo.weights.param_mapping import (
    ParamMapping,
    Replicated,
    ShardedDim0,
    ShardedDim1,
    ShardedGateUp,
    ShardedQKV,
    ShardedVocab,
    TPSharding,
)
from megatron_tempo.weights.pieces import plan
from megatron_tempo.weights.stream import WeightStream
from tests.support.tiny import EXPERT_FFN, VOCAB, write_model

# Cuts


def roundtrip(sharding: TPSharding, sources: list[Tensor], size: int) -> list[Tensor]:
    shards = [sharding.shard(sources, rank, size) for rank in range(size)]
    assert len({shard.shape for shard in shards}) == 1
    wholes = [torch.full_like(source, -1) for source in sources]
    for rank, shard in enumerate(shards):
        sharding.scatter(shard, wholes, rank, size)
    for whole, source in zip(wholes, sources, strict=True):
        assert torch.equal(whole, source)
    return shards


def numbers(*shape: int, start: int = 0) -> Tensor:
    return torch.arange(start, start + torch.Size(shape).numel()).reshape(shape)


sizes = st.sampled_from([1, 2, 3, 4, 8])
lengths = st.integers(1, 5)


@given(sizes, lengths, lengths)
@settings(deadline=None)
def test_placing_every_ranks_cut_gives_the_tensors_back(size: int, part: int, other: int) -> None:
    roundtrip(Replicated(), [numbers(part, other)], size)
    roundtrip(ShardedDim0(size * part), [numbers(size * part, other)], size)
    roundtrip(ShardedDim1(size * part), [numbers(other, size * part)], size)
    roundtrip(ShardedGateUp(size * part), [numbers(size * part, other), numbers(size * part, other, start=1000)], size)


@given(sizes, lengths, lengths, lengths, lengths)
@settings(deadline=None)
def test_queries_keys_and_values_are_placed_back(
    size: int, part: int, queries_per_group: int, head_dim: int, hidden: int
) -> None:
    groups = size * part
    heads = groups * queries_per_group
    qkv = [numbers(count * head_dim, hidden, start=i * 10**6) for i, count in enumerate((heads, groups, groups))]
    roundtrip(ShardedQKV(heads, groups, head_dim), qkv, size)


def test_a_rank_scatters_only_its_shard_in_the_target_type() -> None:
    wholes = [torch.zeros(4, 1, dtype=torch.bfloat16) for _ in range(2)]
    third = torch.tensor([1 / 3])
    ShardedGateUp(4).scatter(torch.stack([torch.ones(1), third, -third, -torch.ones(1)]), wholes, 1, 2)
    rounded = third.bfloat16().item()
    assert rounded != third.item()
    assert [whole.flatten().tolist() for whole in wholes] == [[0, 0, 1, rounded], [0, 0, -rounded, -1]]


@given(st.integers(1, 40), st.integers(1, 9))
@settings(deadline=None)
def test_vocabularies_of_any_size_are_cut_evenly(vocab: int, size: int) -> None:
    shards = roundtrip(ShardedVocab(vocab), [numbers(vocab, 2, start=1)], size)
    padded = torch.cat(shards)
    assert len(padded) == padded_vocab(vocab, size) >= vocab  # the size that the model is built with
    assert all(len(shard) % 16 == 0 for shard in shards)
    assert not padded[vocab:].any()


def test_vocabularies_are_cut_from_files_too(tmp_path: Path) -> None:
    """A file's slices refuse bounds that a tensor takes; 5 rows over 4 ranks leave the others none."""
    save_file({"x": numbers(5, 2, start=1)}, tmp_path / "x.safetensors")
    with safe_open(tmp_path / "x.safetensors", "pt") as file:
        shards = [ShardedVocab(5).shard([file.get_slice("x")], rank, 4) for rank in range(4)]
    assert torch.equal(torch.cat(shards)[:5], numbers(5, 2, start=1))
    assert [len(shard) for shard in shards] == [16, 16, 16, 16]


def test_gate_and_up_by_hand() -> None:
    gate, up = numbers(4, 1), numbers(4, 1, start=10)
    assert ShardedGateUp(4).shard([gate, up], 1, 2).flatten().tolist() == [2, 3, 12, 13]


def test_query_key_value_by_hand() -> None:
    """Four query heads in two groups: Megatron holds q0 q1 k0 v0 q2 q3 k1 v1, a group to each of two ranks."""
    query, key, value = numbers(4, 1), numbers(2, 1, start=10), numbers(2, 1, start=20)
    sharding = ShardedQKV(heads=4, groups=2, head_dim=1)
    assert sharding.shard([query, key, value], 0, 1).flatten().tolist() == [0, 1, 10, 20, 2, 3, 11, 21]
    assert sharding.shard([query, key, value], 1, 2).flatten().tolist() == [2, 3, 11, 21]


# The table


SHAPE = ModelShape(
    family=FAMILIES["qwen3"], layers=4, hidden=32, heads=4, groups=2, head_dim=12, ffn=48, vocab=VOCAB, norm_eps=1e-6,
    tied=False, max_positions=256, attention=(LayerAttention(Rope(1e4)),) * 4,
)  # fmt: skip


@pytest.mark.parametrize(("family", "tied"), [("qwen3", False), ("qwen3", True), ("olmo3", False), ("olmo3", True)])
def test_the_table_lists_transformers_own_tensors(family: str, tied: bool, tmp_path: Path) -> None:
    """Names and shapes of actor and critic, with every tensor once."""
    path = write_model(tmp_path, tied=tied, family=family)
    shape = read_model_shape(path)
    actor = transformers.AutoModelForCausalLM.from_pretrained(path)
    config = transformers.AutoConfig.from_pretrained(path, num_labels=1, tie_word_embeddings=False)
    critic = transformers.AutoModelForTokenClassification.from_config(config)
    for model, is_critic in ((actor, False), (critic, True)):
        theirs = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
        for pipeline in (1, 2, 4):
            mappings = tables.mappings(shape, PipelineLayers(pipeline), critic=is_critic)
            ours = [pair for mapping in mappings for pair in zip(mapping.names, mapping.shapes, strict=True)]
            assert len(ours) == len(theirs)
            assert dict(ours) == theirs
            assert len({(mapping.stage, mapping.megatron) for mapping in mappings}) == len(mappings)
            assert {mapping.stage for mapping in mappings} == set(range(pipeline))


def test_the_table_lists_the_tensors_of_a_saved_mixture(tmp_path: Path) -> None:
    """transformers holds a layer's experts as one tensor and saves each of them; every tensor is listed once."""
    path = write_model(tmp_path / "actor", family="qwen3_moe", layers=4)
    config = transformers.AutoConfig.from_pretrained(path, num_labels=1)
    transformers.AutoModelForTokenClassification.from_config(config).save_pretrained(tmp_path / "critic")
    shape = read_model_shape(path)
    for name in ("actor", "critic"):
        theirs = {one: tuple(saved.shape) for one, saved in load_file(tmp_path / name / "model.safetensors").items()}
        assert theirs["model.layers.3.mlp.experts.7.down_proj.weight"] == (32, EXPERT_FFN)
        for pipeline, ranks in ((1, 1), (2, 4), (4, 8)):
            stages = PipelineLayers(pipeline)
            mappings = tables.mappings(shape, stages, critic=name == "critic", expert_ranks=ranks)
            ours = [pair for mapping in mappings for pair in zip(mapping.names, mapping.shapes, strict=True)]
            assert len(ours) == len(theirs)
            assert dict(ours) == theirs
            assert len({(mapping.stage, mapping.expert_rank, mapping.megatron) for mapping in mappings}) == len(
                mappings
            )
            assert {mapping.expert_rank for mapping in mappings} == {None, *range(ranks)}


def test_expert_ranks_count_their_experts_from_zero() -> None:
    """8 experts over 4 ranks: the third one has experts 4 and 5."""
    shape = replace(SHAPE, family=FAMILIES["qwen3_moe"], experts=Experts(8, 2, 24, normalized=True))
    table = tables.mappings(shape, PipelineLayers(2), critic=False, expert_ranks=4)
    place = {mapping.names[-1]: mapping for mapping in table}
    expert = place["model.layers.2.mlp.experts.5.up_proj.weight"]
    assert (expert.stage, expert.expert_rank) == (1, 2)
    assert expert.megatron == "decoder.layers.0.mlp.experts.1.linear_fc1.weight"
    assert expert.names[0] == "model.layers.2.mlp.experts.5.gate_proj.weight"
    assert expert.shapes == ((24, 32), (24, 32))
    assert expert.sharding == ShardedGateUp(24)
    router = place["model.layers.2.mlp.gate.weight"]
    assert (router.megatron, router.stage, router.expert_rank) == ("decoder.layers.0.mlp.router.weight", 1, None)
    assert (router.shapes, router.sharding) == (((8, 32),), Replicated())


def test_stages_count_their_layers_from_zero() -> None:
    mappings = {mapping.names[0]: mapping for mapping in tables.mappings(SHAPE, PipelineLayers(2), critic=False)}
    place = {name: (mapping.stage, mapping.megatron) for name, mapping in mappings.items()}
    assert place["model.embed_tokens.weight"][0] == 0
    assert place["model.layers.1.mlp.down_proj.weight"] == (0, "decoder.layers.1.mlp.linear_fc2.weight")
    assert place["model.layers.2.mlp.down_proj.weight"] == (1, "decoder.layers.0.mlp.linear_fc2.weight")
    assert place["model.norm.weight"] == (1, "decoder.final_layernorm.weight")
    assert place["lm_head.weight"] == (1, "output_layer.weight")


@pytest.mark.parametrize("first", [1, 3])
def test_uneven_stages_have_their_own_layers(first: int) -> None:
    whole = tables.mappings(SHAPE, critic=False)
    mappings = tables.mappings(SHAPE, PipelineLayers(2, first), critic=False)
    assert [mapping.names for mapping in mappings] == [mapping.names for mapping in whole]
    place = {mapping.names[0]: (mapping.stage, mapping.megatron) for mapping in mappings}
    for layer in range(4):
        stage, local = (0, layer) if layer < first else (1, layer - first)
        down = place[f"model.layers.{layer}.mlp.down_proj.weight"]
        assert down == (stage, f"decoder.layers.{local}.mlp.linear_fc2.weight")
    assert place["lm_head.weight"] == (1, "output_layer.weight")


# Buckets


@pytest.mark.parametrize("limit", [1, 10_000, 40_000, 10**9])
@pytest.mark.parametrize("pipeline", [1, 2])
def test_buckets_keep_order_stage_and_size(limit: int, pipeline: int) -> None:
    mappings = tables.mappings(SHAPE, PipelineLayers(pipeline), critic=False)
    groups = plan(mappings, limit, 4)
    assert [mapping for group in groups for mapping in group] == mappings
    for group in groups:
        assert len({mapping.stage for mapping in group}) == 1
        assert len(group) == 1 or 4 * sum(mapping.numel for mapping in group) <= limit
    if limit == 10**9:
        assert len(groups) == pipeline


def test_a_slot_counts_all_its_tensors() -> None:
    assert ParamMapping("x", ("a", "b"), ((3, 4), (5,)), Replicated(), 0).numel == 17


# Folders


@pytest.fixture(scope="module")
def layout() -> Iterator[Layout]:
    install_cpu_backend()
    with parallel_groups(ParallelConfig(), torch.device("cpu"), 0) as groups:
        yield groups.actor


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("original"), tied=False, layers=2)


@pytest.fixture
def model(original: Path, tmp_path: Path) -> Path:
    """A folder to spoil."""
    for path in original.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


def load(path: Path, layout: Layout, *, critic: bool = False) -> PackedGPT:
    shape = read_model_shape(path)
    common = transformer_config(shape, layout, Precision.fp32), shape, layout, REFERENCE
    net = ValueModel(*common) if critic else LanguageModel(*common, Logits.recomputed, temperature=1.0)
    folder.load(net, layout, tables.mappings(shape, critic=critic), path)
    return net


def rewrite(path: Path, **changes: Tensor | None) -> None:
    """Replace, add or (None) leave out tensors of model.safetensors; `__` stands for the dots in names."""
    file = path / "model.safetensors"
    named = {name.replace("__", "."): tensor for name, tensor in changes.items()}
    merged = load_file(file) | named
    save_file({name: tensor for name, tensor in merged.items() if tensor is not None}, file)


def saved(net: PackedGPT, layout: Layout, out: Path, like: Path, limit: int = 5000) -> None:
    mappings = tables.mappings(net.shape, critic=isinstance(net, ValueModel))
    buckets = WeightStream(net, layout, mappings, limit).everywhere()
    folder.save(buckets, out, like, layout, {"comment": "changed"})


def test_a_folder_comes_back_as_it_was(model: Path, layout: Layout, tmp_path: Path) -> None:
    out = tmp_path / "a/b"
    saved(load(model, layout), layout, out, model)
    original = load_file(model / "model.safetensors")
    tensors_of = {
        name: tensor
        for bucket in folder.FolderWeights(out, layout, 5000, torch.device("cpu"), torch.float32).everywhere()
        for name, tensor in bucket
    }
    assert tensors_of.keys() == original.keys()
    assert all(torch.equal(tensors_of[name], original[name]) for name in original)
    assert json.loads((out / "config.json").read_text())["comment"] == "changed"
    assert (out / "tokenizer.json").read_bytes() == (model / "tokenizer.json").read_bytes()
    index = json.loads((out / folder.INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in original.values())
    assert len(set(index["weight_map"].values())) > 3, "several buckets, several files"
    assert not list(out.parent.glob("*.partial"))


def test_all_problems_of_a_folder_are_reported_at_once(model: Path, layout: Layout) -> None:
    rewrite(
        model,
        model__norm__weight=None,
        model__layers__1__mlp__up_proj__weight=torch.zeros(48, 31),
        model__layers__2__mlp__up_proj__weight=torch.zeros(48, 32),
    )
    with pytest.raises(ValueError, match="3 problems") as error:
        load(model, layout)
    message = str(error.value)
    assert str(model) in message
    assert "missing: model.norm.weight" in message
    assert "unexpected: model.layers.2.mlp.up_proj.weight" in message
    assert "wrong shape: model.layers.1.mlp.up_proj.weight is [48, 31], the config.json says [48, 32]" in message


def test_frequencies_that_old_folders_have_are_left_out(model: Path, layout: Layout) -> None:
    """Of Llama's rotary embedding."""
    rewrite(model, model__layers__1__self_attn__rotary_emb__inv_freq=torch.ones(6))
    load(model, layout)


def test_an_actor_requires_its_output_matrix(model: Path, layout: Layout) -> None:
    rewrite(model, lm_head__weight=None)
    with pytest.raises(ValueError, match=r"missing: lm_head.weight"):
        load(model, layout)


def test_a_critic_starts_from_an_actors_folder_with_a_zero_head(model: Path, layout: Layout) -> None:
    net = load(model, layout, critic=True)
    assert not net.output_layer.weight.any()
    assert not net.output_layer.bias.any()
    weights = load_file(model / "model.safetensors")
    assert torch.equal(net.decoder.final_layernorm.weight, weights["model.norm.weight"])
    # ... but half a value head is none.
    rewrite(model, score__weight=torch.ones(1, 32))
    with pytest.raises(ValueError, match=r"missing: score.bias"):
        load(model, layout, critic=True)


def test_a_critics_folder_gives_its_head(model: Path, layout: Layout, tmp_path: Path) -> None:
    rewrite(model, lm_head__weight=None, score__weight=torch.full((1, 32), 0.5), score__bias=torch.tensor([0.25]))
    net = load(model, layout, critic=True)
    saved(net, layout, tmp_path / "out", model)
    again = load(tmp_path / "out", layout, critic=True)
    assert torch.equal(again.output_layer.weight, torch.full((1, 32), 0.5))
    assert again.output_layer.bias.tolist() == [0.25]
    rewrite(model, score__weight=torch.ones(2, 32))
    with pytest.raises(ValueError, match=r"wrong shape: score.weight is \[2, 32\]"):
        load(model, layout, critic=True)


def test_a_folder_without_weights(model: Path) -> None:
    (model / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"neither model\.safetensors nor model\.safetensors\.index\.json"):
        folder.tensor_files(model)


def test_an_index_that_names_absent_files(model: Path, layout: Layout) -> None:
    names = list(load_file(model / "model.safetensors"))
    files = ["model.safetensors", "absent-2.safetensors", "absent-3.safetensors"]
    index = {"weight_map": {name: files[i % 3] for i, name in enumerate(names)}}
    (model / folder.INDEX).write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"absent-2\.safetensors, .*absent-3\.safetensors"):
        load(model, layout)


@pytest.mark.parametrize(
    "content",
    [b"", b"version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 99\n", "cut"],
    ids=["empty", "lfs-pointer", "cut-short"],
)
def test_a_file_that_is_no_safetensors_is_named(model: Path, layout: Layout, content: bytes | str) -> None:
    file = model / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000] if isinstance(content, str) else content)
    with pytest.raises(ValueError, match=r"model\.safetensors"):
        load(model, layout)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": []}'])
def test_an_index_that_is_none_is_named(model: Path, text: str) -> None:
    (model / folder.INDEX).write_text(text)
    with pytest.raises(ValueError, match=r"index\.json"):
        folder.tensor_files(model)


def test_an_index_that_names_the_wrong_file_for_a_tensor(model: Path, layout: Layout) -> None:
    weights = load_file(model / "model.safetensors")
    norm = weights.pop("model.norm.weight")
    save_file(weights, model / "one.safetensors")
    save_file({"model.norm.weight": norm}, model / "two.safetensors")
    (model / folder.INDEX).write_text(
        json.dumps({"weight_map": dict.fromkeys([*weights, "model.norm.weight"], "one.safetensors")})
    )
    with pytest.raises(ValueError, match=r"model\.norm\.weight"):
        load(model, layout)


BAD_WEIGHTS: dict[str, tuple[dict[str, Tensor | None], str]] = {
    "nan": ({"model__norm__weight": torch.full((32,), torch.nan)}, r"NaN or infinite in model\.norm\.weight"),
    "infinite": (
        {"model__layers__1__self_attn__k_proj__weight": torch.eye(24, 32) * torch.inf},
        r"NaN or infinite in model\.layers\.1\.self_attn\.",
    ),
    "overflow": ({"model__norm__weight": torch.full((32,), 1e300, dtype=torch.float64)}, "NaN or infinite"),
    "int8": ({"model__norm__weight": torch.ones(32, dtype=torch.int8)}, r"model\.norm\.weight is I8: weights are BF16"),
    "int64": ({"model__norm__weight": torch.ones(32, dtype=torch.int64)}, r"model\.norm\.weight is I64: weights are"),
    "bool": ({"model__norm__weight": torch.ones(32, dtype=torch.bool)}, r"model\.norm\.weight is BOOL: weights are"),
    "fp8": (
        {"model__norm__weight": torch.ones(32).to(torch.float8_e4m3fn), "model__norm__weight_scale_inv": torch.ones(1)},
        r"model\.norm\.weight is F8_E4M3: weights are .* before quantisation",
    ),
    "missing": ({"model__norm__weight": None}, r"missing: model\.norm\.weight"),
    "shape": ({"model__norm__weight": torch.ones(31)}, r"wrong shape: model\.norm\.weight is \[31\]"),
}


@pytest.mark.parametrize("name", BAD_WEIGHTS)
def test_training_and_evaluation_refuse_the_same_weights(model: Path, layout: Layout, name: str) -> None:
    changes, words = BAD_WEIGHTS[name]
    rewrite(model, **changes)
    with pytest.raises(InputError, match=words):
        load(model, layout)
    with pytest.raises(InputError, match=words):
        list(folder.FolderWeights(model, layout, 5000, torch.device("cpu"), torch.float32).everywhere())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_every_type_of_floats_is_taken(model: Path, layout: Layout, dtype: torch.dtype) -> None:
    rewrite(model, **{name: tensor.to(dtype) for name, tensor in load_file(model / "model.safetensors").items()})
    load(model, layout)
    assert len(list(folder.FolderWeights(model, layout, 5000, torch.device("cpu"), torch.float32).everywhere())) > 3


def test_a_quantised_config_is_refused(model: Path, layout: Layout) -> None:
    config = json.loads((model / "config.json").read_text()) | {"quantization_config": {"quant_method": "fp8"}}
    (model / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"quantised \(quantization_config: fp8\)"):
        folder.FolderWeights(model, layout, 5000, torch.device("cpu"), torch.float32)


def test_an_output_matrix_that_differs_from_a_tied_embedding_is_refused(tmp_path: Path, layout: Layout) -> None:
    model = write_model(tmp_path / "tied", tied=True)
    embedding = load_file(model / "model.safetensors")["model.embed_tokens.weight"]
    rewrite(model, lm_head__weight=embedding.clone())
    load(model, layout)
    names = [
        name
        for bucket in folder.FolderWeights(model, layout, 5000, torch.device("cpu"), torch.float32).everywhere()
        for name, _ in bucket
    ]
    assert "lm_head.weight" not in names, "published folders may repeat the matrix"
    rewrite(model, lm_head__weight=embedding * 1.01)
    for read in (
        lambda: load(model, layout),
        lambda: folder.FolderWeights(model, layout, 5000, torch.device("cpu"), torch.float32),
    ):
        with pytest.raises(InputError, match=r"lm_head\.weight differs from model\.embed_tokens\.weight"):
            read()
    load(model, layout, critic=True)  # which has a head of its own


def test_all_chat_templates_are_carried(model: Path, layout: Layout, tmp_path: Path) -> None:
    (model / "additional_chat_templates").mkdir()
    (model / "additional_chat_templates" / "rag.jinja").write_text("{{ 1 }}")
    (model / "chat_template.jinja").write_text("{{ 0 }}")
    saved(load(model, layout), layout, tmp_path / "out", model)
    assert (tmp_path / "out/additional_chat_templates/rag.jinja").read_text() == "{{ 1 }}"
    assert (tmp_path / "out/chat_template.jinja").read_text() == "{{ 0 }}"


@pytest.mark.parametrize("kind", ["pipe", "folder"])
def test_weights_that_are_no_file_are_named(model: Path, layout: Layout, kind: str) -> None:
    path = model / "model.safetensors"
    path.unlink()
    os.mkfifo(path) if kind == "pipe" else path.mkdir()
    with pytest.raises(InputError, match=r"model\.safetensors is a (named pipe|folder), not a file"):
        load(model, layout)


def test_a_config_that_transformers_cannot_read_is_named(model: Path) -> None:
    path = model / "config.json"
    config = json.loads(path.read_text())
    for text in ("[]", "3", json.dumps(config)[:-5], json.dumps(config | {"num_hidden_layers": "x"})):
        path.write_text(text)
        with pytest.raises(InputError, match=r"config\.json"):
            read_model_shape(model)


def test_a_folder_that_is_there_is_not_overwritten(model: Path, layout: Layout, tmp_path: Path) -> None:
    net = load(model, layout)
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"out exists: move it away"):
        saved(net, layout, out, model)
    assert [path.name for path in out.iterdir()] == ["mine.txt"]


def test_what_an_interrupted_save_left_is_replaced(model: Path, layout: Layout, tmp_path: Path) -> None:
    partial = tmp_path / "out.partial"
    partial.mkdir()
    (partial / "model-00099.safetensors").write_bytes(b"half")
    saved(load(model, layout), layout, tmp_path / "out", model)
    assert not partial.exists()
    assert "model-00099.safetensors" not in {path.name for path in (tmp_path / "out").iterdir()}
