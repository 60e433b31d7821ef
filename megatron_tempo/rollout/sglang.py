"""The SGLang engine: a server that the first rank starts, asked by all ranks over HTTP.

The first rank sends it the weights, bucket by bucket, in a process group with its workers, and then proves that they
are the right ones: SGLang answers an unknown name or a missing tensor with success. On a CPU SGLang's checksum of a
tensor is that of its bytes, so that every tensor is compared. On a GPU it is another, and the run's comparison of
log-probabilities at its start is the proof.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import httpx
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_tempo.config.schema import Precision, SglangConfig
from megatron_tempo.errors import EngineError
from megatron_tempo.rollout.embedded import end_tokens
from megatron_tempo.rollout.engine import Request, Sampling
from megatron_tempo.rollout.sglang_server import SglangServer
from megatron_tempo.rollout.transfer import NAME, Sender, joined_bytes
from megatron_tempo.types import Completion, TokenCount

# SGLang's vocabularies are filled up with zero rows to a multiple of this.
_VOCABULARY_MULTIPLE = 64
# Said outright, since what is not said may come from the model's generation_config.json.
_NOTHING_ELSE = {
    "top_p": 1.0,
    "top_k": -1,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "frequency_penalty": 0.0,
    "presence_penalty": 0.0,
}
# Its parameters that hold several of Hugging Face's, one behind the other.
_FUSED = {
    "self_attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
}


class SglangEngine:
    """An `Engine`. The seeds of requests are not used: SGLang draws its own numbers."""

    def __init__(
        self, config: SglangConfig, model: Path, work: Path, precision: Precision, device: torch.device, vocab: int
    ) -> None:
        """Collective: the first rank starts the server in `work`, the others learn its address."""
        self._config, self._vocab = config, vocab
        self._end_tokens = end_tokens(model)
        self._comparable = device.type == "cpu" and config.tensor == 1
        self._server: SglangServer | None = None
        self._version: int | None = None
        self._syncs = 0
        self.counted = TokenCount()
        address: list[Any] = [None]
        if dist.get_rank() == 0:
            self._server = SglangServer(config, model, work, precision, cuda=device.type == "cuda")
            address = [(self._server.url, self._server.key)]
        dist.broadcast_object_list(address, src=0)
        url, key = address[0]
        self._client = httpx.Client(
            base_url=url,
            headers={"Authorization": f"Bearer {key}"},
            timeout=config.answer_seconds,
            limits=httpx.Limits(max_connections=config.concurrency),
        )
        self._pool = ThreadPoolExecutor(config.concurrency)
        self._sender: Sender | None = None
        if self._server is not None:
            self._sender = self._meet("gloo" if device.type == "cpu" else "nccl")

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[list[Completion]]:
        assert self._version is not None, "load_weights comes first"
        answers = list(self._pool.map(lambda request: self._ask(request, sampling), requests))
        self.counted.add(sum(len(c.token_ids) for answer in answers for c in answer), 0)
        return answers

    def load_weights(self, buckets: Iterable[Sequence[tuple[str, Tensor]]], version: int) -> None:
        if self._sender is None:
            for _ in buckets:  # takes part in gathering them
                pass
        else:
            self._send(buckets, version)
        dist.barrier()
        self._version = version

    def close(self) -> None:
        if self._server is not None:
            self._server.close()  # first: what is still asked then fails, and nobody waits for it
        self._client.close()
        self._pool.shutdown(wait=False, cancel_futures=True)

    # Weights

    def _meet(self, backend: str) -> Sender:
        sender = Sender(self._config.host, self._config.tensor, backend, timedelta(seconds=self._config.start_seconds))
        body = {
            "master_address": self._config.host,
            "master_port": sender.port,
            "rank_offset": 1,
            "world_size": sender.world,
            "group_name": NAME,
            "backend": backend,
        }
        answer = self._pool.submit(self._post, "init_weights_update_group", body)
        sender.join()
        answer.result()
        return sender

    def _send(self, buckets: Iterable[Sequence[tuple[str, Tensor]]], version: int) -> None:
        every = self._config.checksums_every
        compare = self._comparable and every > 0 and self._syncs % every == 0
        wanted: dict[str, str] = {}
        self._syncs += 1
        self._post("pause_generation", {"mode": "retract"})
        self._post("begin_weight_update", {})
        for bucket in buckets:
            self._send_bucket(bucket, version)
            if compare:
                wanted |= dict(checksums(bucket))
        self._post("end_weight_update", {})
        if wanted:
            self._compare(wanted)
        self._post("continue_generation", {})

    def _send_bucket(self, bucket: Sequence[tuple[str, Tensor]], version: int) -> None:
        assert self._sender is not None
        body = {
            "names": [name for name, _ in bucket],
            "dtypes": [str(tensor.dtype).removeprefix("torch.") for _, tensor in bucket],
            "shapes": [list(tensor.shape) for _, tensor in bucket],
            "group_name": NAME,
            "load_format": "flattened_bucket",
            "flush_cache": True,  # else prefixes of the old weights would be answered from
            "weight_version": str(version),
        }
        answer: Future[Any] = self._pool.submit(self._post, "update_weights_from_distributed", body)
        self._sender.send([tensor for _, tensor in bucket])
        answer.result()

    def _compare(self, wanted: dict[str, str]) -> None:
        found = self._post("weights_checker", {"action": "checksum"})["ranks"][0]["checksums"]
        if "lm_head.weight" in found and "lm_head.weight" not in wanted:  # tied
            wanted["lm_head.weight"] = wanted["model.embed_tokens.weight"]
        wrong = [name for name in sorted(found.keys() | wanted.keys()) if found.get(name) != wanted.get(name)]
        if wrong:
            many = f"{len(wrong)} of {len(found)} tensors differ"
            raise EngineError(f"the engine's weights are not the actor's: {many}, first {wrong[0]}")

    # Responses

    def _ask(self, request: Request, sampling: Sampling) -> list[Completion]:
        body = {
            "input_ids": [list(request.token_ids)],
            "sampling_params": {
                "n": request.samples,
                "temperature": sampling.temperature,
                "max_new_tokens": sampling.max_tokens,
                "stop_token_ids": self._end_tokens,
                **_NOTHING_ELSE,
            },
            "return_logprob": True,
        }
        answers = self._post("generate", body)
        if len(answers) != request.samples:
            raise EngineError(f"SGLang gave {len(answers)} responses where {request.samples} were asked for")
        return [self._completion(answer, sampling) for answer in answers]

    def _completion(self, answer: dict[str, Any], sampling: Sampling) -> Completion:
        """The answer, if it makes sense: a response that is not what it seems to be would be trained on."""
        tokens, meta = answer["output_ids"], answer["meta_info"]
        logprobs = [entry[0] for entry in meta["output_token_logprobs"]]
        reason = meta["finish_reason"]["type"]
        versions = {part["version"] for part in meta["weight_versions"]}
        doubts = [
            (reason not in ("stop", "length"), f"ended by {reason}"),
            (not 1 <= len(tokens) <= sampling.max_tokens, f"{len(tokens)} tokens of at most {sampling.max_tokens}"),
            (len(logprobs) != len(tokens), f"{len(logprobs)} log-probabilities of {len(tokens)} tokens"),
            (any(not 0 <= token < self._vocab for token in tokens), "a token out of the vocabulary"),
            (any(not math.isfinite(p) or p > 1e-3 for p in logprobs), "a log-probability that is none"),
            (versions != {str(self._version)}, f"weights of version {sorted(versions)}, not {self._version}"),
        ]
        if wrong := [words for is_wrong, words in doubts if is_wrong]:
            raise EngineError(f"SGLang's response makes no sense: {'; '.join(wrong)}")
        assert self._version is not None
        return Completion(tuple(tokens), tuple(min(p, 0.0) for p in logprobs), reason, self._version)

    def _post(self, path: str, body: dict[str, Any]) -> Any:
        try:
            response = self._client.post(f"/{path}", json=body)
        except httpx.HTTPError as error:
            words = "" if self._server is None else self._server.last_words()
            raise EngineError(f"SGLang did not answer /{path}: {type(error).__name__} {error}{words}") from error
        if response.status_code != 200:
            raise EngineError(f"SGLang answered /{path} with {response.status_code}: {response.text[:500]}")
        answer = response.json()
        if isinstance(answer, dict) and answer.get("success") is False:
            raise EngineError(f"SGLang refused /{path}: {answer.get('message')}")
        return answer


def checksums(bucket: Sequence[tuple[str, Tensor]]) -> Iterator[tuple[str, str]]:
    """SGLang's names of a bucket's parameters, and the first 8 bytes of the SHA-256 of each, in hexadecimal.

    A bucket has all parts of a fused parameter, since they are one Megatron parameter.
    """
    tensors = dict(bucket)
    while tensors:
        name, tensor = next(iter(tensors.items()))
        parts, whole = [name], name
        for fused, of in _FUSED.items():
            if f".{of[0]}." in name:
                parts = [name.replace(of[0], part) for part in of]
                whole = name.replace(of[0], fused)
        data = torch.cat([tensors.pop(part) for part in parts]) if len(parts) > 1 else tensors.pop(name)
        if name in ("model.embed_tokens.weight", "lm_head.weight"):
            padding = -len(tensor) % _VOCABULARY_MULTIPLE
            data = torch.cat([data, data.new_zeros(padding, *data.shape[1:])])
        yield whole, hashlib.sha256(joined_bytes([data]).cpu().numpy().tobytes()).hexdigest()[:16]
