"""The embedded engine's cache and attention against transformers' own."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from transformers import DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from megatron_tempo.config.sizes import CACHE_ROOM
from megatron_tempo.rollout.kv_cache import _grouped_sdpa, attention_for, new_cache


def test_it_holds_what_transformers_cache_holds() -> None:
    """Through a prompt, single tokens beyond the room, copies of rows, and rows that leave."""
    torch.manual_seed(0)
    ours, theirs = new_cache(), DynamicCache()
    rows, steps = 2, [5, *[1] * (CACHE_ROOM + 3), "select", *[1] * 4, "drop", 1, 1]
    for step in steps:
        if isinstance(step, str):
            kept = torch.tensor([0, 0, 1, 1, 1]) if step == "select" else torch.tensor([1, 4])
            rows = len(kept)
            for cache in (ours, theirs):
                cache.batch_select_indices(kept)
            continue
        for layer in range(2):
            new = torch.randn(2, rows, 3, step, 4)
            for got, wanted in zip(ours.update(*new, layer), theirs.update(*new, layer), strict=True):
                assert torch.equal(got, wanted)
        assert ours.get_seq_length() == theirs.get_seq_length()


def test_a_token_is_written_without_a_copy_of_the_others() -> None:
    cache = new_cache()
    keys, _ = cache.update(*torch.zeros(2, 1, 1, 3, 4), 0)
    for _ in range(CACHE_ROOM):
        again, _ = cache.update(*torch.ones(2, 1, 1, 1, 4), 0)
        assert again.data_ptr() == keys.data_ptr()
    moved, _ = cache.update(*torch.ones(2, 1, 1, 1, 4), 0)
    assert moved.data_ptr() != keys.data_ptr()


@pytest.mark.parametrize("queries", [1, 6])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_attention_is_that_of_transformers(queries: int, masked: bool, groups: int) -> None:
    torch.manual_seed(queries)
    query, (key, value) = torch.randn(3, 4, queries, 8), torch.randn(2, 3, groups, 6, 8)
    mask = None
    if masked:
        mask = torch.ones(queries, 6, dtype=torch.bool).tril(6 - queries).repeat(3, 1, 1, 1)
        mask[0, ..., 0] = queries == 6  # padding before a prompt, which its own queries see
    module = SimpleNamespace(num_key_value_groups=4 // groups, is_causal=True, training=False)
    wanted, _ = sdpa_attention_forward(module, query, key, value, mask, scaling=0.3)
    found, _ = _grouped_sdpa(module, query, key, value, mask, scaling=0.3)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


def test_only_a_cpu_has_an_attention_of_its_own() -> None:
    """On CUDA, torch has no fast kernel for grouped queries with a mask."""
    assert attention_for(torch.device("cuda")) == "sdpa"
    assert attention_for(torch.device("cpu")) != "sdpa"
