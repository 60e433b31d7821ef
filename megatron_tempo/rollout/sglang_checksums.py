"""What SGLang 0.5.23 answers for its checksums: which part of which tensor a tensor rank has, and its two functions.

On a CPU the checksum is the beginning of the bytes' SHA-256. On a GPU it is a function of SGLang's own
(`kernels/ops/memory/gpu_tensor_hash.py`), which is written here again, since the trainer does not import SGLang.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import torch
from torch import Tensor

from megatron_tempo.rollout.transfer import joined_bytes
from megatron_tempo.types import Bucket

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
# Vocabularies are padded with zero rows to a multiple of this, or of this times the tensor ranks.
_VOCABULARY_MULTIPLE = 64
# Parameters that are concatenations of several of Hugging Face's.
_QKV, _GATED = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("mlp.gate_proj", "mlp.up_proj")
FUSED = {"self_attn.qkv_proj": _QKV, "mlp.gate_up_proj": _GATED}
_BY_COLUMNS = ("self_attn.o_proj.weight", "mlp.down_proj.weight")

TILE, _CHUNK = 8192, 1 << 11  # words of a tile; tiles per step, which bounds the memory
_SEED = 0x243F6A88
_SEEDS = (_SEED, ((_SEED * 0x9E3779B1) ^ 0xDEADBEEF) & 0xFFFFFFFF)
_PLACES = ((0x27D4EB2D, 15), (0x165667B1, 13))  # of a word's number: factor, bits of rotation
_MASK = 0xFFFFFFFF


def of_rank(name: str, rank: int, ranks: int) -> str:
    """The name of a parameter on one of several tensor ranks."""
    return f"{name} (tensor rank {rank})" if ranks > 1 else name


def installed(bucket: Bucket, ranks: int, key_heads: int | None) -> Iterator[tuple[str, int, Tensor]]:
    """(SGLang's name, tensor rank, parameter) for what the tensor ranks hold of a bucket's tensors.

    A bucket contains all parts of a fused parameter, since they are one Megatron parameter. Scales are left out: SGLang
    has one checksum of a weight and its scales.
    """
    tensors = {name: tensor for name, tensor in bucket if not name.endswith("_scale_inv")}
    while tensors:
        name = next(iter(tensors))
        parts, whole = [name], name
        for fused, of in FUSED.items():
            if f".{of[0]}." in name:
                parts = [name.replace(of[0], part) for part in of]
                whole = name.replace(of[0], fused)
        taken = [tensors.pop(part) for part in parts]
        for rank in range(ranks):
            shards = [_shard(part, one, rank, ranks, key_heads) for part, one in zip(parts, taken, strict=True)]
            yield whole, rank, shards[0] if len(shards) == 1 else torch.cat(shards)


def _shard(name: str, tensor: Tensor, rank: int, ranks: int, key_heads: int | None) -> Tensor:
    """What a tensor rank has of a tensor. Norms are the same on every rank."""
    if name in (EMBEDDING, HEAD):
        rows = _padded_rows(len(tensor), ranks) // ranks
        own = tensor[rank * rows : (rank + 1) * rows]
        return torch.nn.functional.pad(own, (0, 0, 0, rows - len(own)))
    if ranks == 1:
        return tensor
    if name.endswith(_BY_COLUMNS):
        return tensor.chunk(ranks, dim=1)[rank]
    if any(f".{part}." in name for part in (*_QKV, *_GATED)):
        is_key = any(f".{part}." in name for part in _QKV[1:])
        copies = max(1, ranks // key_heads) if is_key and key_heads is not None else 1  # of a head of keys
        return tensor.chunk(ranks // copies)[rank // copies]
    return tensor


def _padded_rows(rows: int, ranks: int) -> int:
    """The rows of a padded vocabulary (0.5.23, `srt/layers/vocab_parallel_embedding.py`)."""
    padded = rows + -rows % _VOCABULARY_MULTIPLE
    return padded if padded % ranks == 0 else rows + -rows % (_VOCABULARY_MULTIPLE * ranks)


def bytes_hash(tensor: Tensor) -> str:
    """The first 8 bytes of the SHA-256 of a tensor's bytes, in hexadecimal."""
    return hashlib.sha256(joined_bytes([tensor]).cpu().numpy().data).hexdigest()[:16]


def gpu_hash(tensor: Tensor) -> str:
    """`gpu_tensor_hash`: each 32-bit word is mixed with its number, a tile's words are added up, then the tiles."""
    data = tensor.detach().contiguous().flatten().view(torch.uint8)
    words = torch.nn.functional.pad(data, (0, -len(data) % 4)).view(torch.int32)
    return final_hash(tile_total(words, 0, len(words)) if len(words) else 0)


def tile_total(words: Tensor, first: int, count: int) -> int:
    """The sum over the tiles of some of a tensor's words, int32 [n], modulo 2**64.

    `first`: the number of the first one, a multiple of `TILE`. `count`: of all words of the tensor.
    """
    device = torch.device("cuda") if torch.cuda.is_available() else words.device  # joined parts are in host memory
    total = torch.zeros((), dtype=torch.int64, device=device)
    for start in range(0, len(words), _CHUNK * TILE):
        part = words[start : start + _CHUNK * TILE].to(device)
        high, low = (_tile_sums(part, first + start, count, which) for which in (0, 1))
        total += ((high << 32) | low).sum()  # modulo 2**64
    return int(total) % 2**64


def _tile_sums(words: Tensor, first: int, count: int, which: int) -> Tensor:
    """One of the two 32-bit sums of each tile, mixed with the tensor's bytes. `first`: the number of the first word."""
    (factor, turn), seed = _PLACES[which], _SEEDS[which]
    number = torch.arange(first, first + len(words), device=words.device) & _MASK
    place = ((_times(number, factor) + seed) & _MASK) ^ (((number << turn) & _MASK) | (number >> (32 - turn)))
    mixed = _mix((words.long() & _MASK) ^ place)
    sums = torch.nn.functional.pad(mixed, (0, -len(mixed) % TILE)).view(-1, TILE).sum(1) & _MASK
    return _mix(sums ^ (count * 4 & _MASK))


def _mix(word: Tensor) -> Tensor:
    """MurmurHash3's last step for 32 bits (`_fmix32`), of int64 that hold 32 bits."""
    word = _times(word ^ (word >> 16), 0x85EBCA6B)
    word = _times(word ^ (word >> 13), 0xC2B2AE35)
    return word ^ (word >> 16)


def _times(word: Tensor, factor: int) -> Tensor:
    """The product modulo 2**32. An int64 product wraps modulo 2**64, which leaves its lower half right."""
    return (word * factor) & _MASK


def final_hash(total: int) -> str:
    """SplitMix64's last step (`_final_splitmix64`) on the sum of a tensor's tiles, in hexadecimal."""
    mask = (1 << 64) - 1
    total ^= total >> 30
    total = (total * 0xBF58476D1CE4E5B9) & mask
    total ^= total >> 27
    total = (total * 0x94D049BB133111EB) & mask
    return f"{total ^ (total >> 31):016x}"
