"""The embedded engine: a transformers model in the trainer's process, with a KV cache.

Rows are decoded in batches. The samples of a prompt share its prefill. Rows that have ended leave the batch, so the
model computes little padding.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, repeat
from math import inf
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers
from torch import Tensor

from megatron_tempo.config.routing import RoutingFormat
from megatron_tempo.data.tokenizer import end_tokens
from megatron_tempo.errors import EngineError
from megatron_tempo.kernels.truncation import lowest_kept
from megatron_tempo.rollout.engine import EngineWork, Request, Sampling
from megatron_tempo.rollout.kv_cache import attention_for, new_cache
from megatron_tempo.rollout.partial_requests import grown
from megatron_tempo.rollout.recorded_experts import RecordedExperts, RouterRecorder
from megatron_tempo.rollout.stop_strings import StopStrings, StopText
from megatron_tempo.runtime import progress_marker
from megatron_tempo.types import UNFINISHED, Completion, EngineHealth, PartName, TokenCount, Weights, whole_name

# Ended rows are removed from the cache once they are this share of the batch. Each removal copies the cache.
ENDED_SHARE = 1 / 16


class EmbeddedEngine:
    """An `Engine` on this process's device."""

    asleep = False

    def __init__(
        self,
        folder: Path,
        device: torch.device,
        dtype: torch.dtype,
        batch_rows: int,
        routing: RoutingFormat | None = None,
    ) -> None:
        """`folder` has the config and the end tokens. `load_weights` provides the weights.

        `routing`: of the experts that it returns where a sampling asks for them; None: it returns none.
        """
        with device:
            config = transformers.AutoConfig.from_pretrained(folder)
            attention = attention_for(device)
            model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)
            self._model: Any = model.eval()
        # Renamed during transformers 5; the old name gives a warning for each call, until 5.40 removes it.
        arguments = inspect.signature(self._model.forward).parameters
        self._cache_argument = "cache" if "cache" in arguments else "past_key_values"
        self._routers = None if routing is None else RouterRecorder(self._model, routing)
        self._device = device
        self._folder = folder
        self._stops: StopStrings | None = None  # of the last sampling that had some
        self._batch_rows = batch_rows
        self._end_tokens = torch.tensor(end_tokens(folder), device=device)
        self._version: int | None = None
        self.counted = TokenCount()
        self.work = EngineWork()
        self.replicas = 1

    def sleep(self) -> None:
        """It keeps its memory: see `Engine`."""

    @torch.no_grad()
    def load_weights(self, weights: Weights, version: int) -> None:
        parameters = _published(self._model)
        # The second name of a tied matrix: published folders may repeat it.
        unique = {name for name, _ in self._model.named_parameters()}
        repeated = {name for name, _ in self._model.named_parameters(remove_duplicate=False)} - unique
        left = set(parameters)
        for bucket in weights.everywhere(parts=True):
            for name, tensor in bucket:
                if whole_name(name) in repeated:
                    continue
                target = _rows(parameters, name)
                if target is None or target.shape != tensor.shape:
                    expected = "no such tensor" if target is None else f"shape {tuple(target.shape)}"
                    raise ValueError(
                        f"weight {name} of shape {tuple(tensor.shape)} does not fit the engine: {expected}"
                    )
                target.copy_(tensor)
                if not isinstance(name, PartName) or name.stop == name.rows:  # parts arrive in order
                    left.discard(whole_name(name))
        if left:
            raise ValueError(f"the weight update left out {len(left)} tensors: {', '.join(sorted(left)[:5])}")
        self._version = version

    def differences(self, weights: Weights) -> list[tuple[str, float]]:
        parameters = _published(self._model)
        sums: dict[str, tuple[float, float]] = {}  # of each tensor: the squares of its differences, and of its elements
        for name, tensor in (pair for bucket in weights.everywhere(parts=True) for pair in bucket):
            if (held := _rows(parameters, name)) is not None:
                apart, size = sums.get(whole_name(name), (0.0, 0.0))
                of_part = 0.0 if torch.equal(held, tensor) else float((held - tensor).norm()) ** 2
                sums[whole_name(name)] = apart + of_part, size + float(tensor.norm()) ** 2
        differences = [(name, (apart / size) ** 0.5 if size else inf) for name, (apart, size) in sums.items() if apart]
        return sorted(differences, key=lambda item: -item[1])

    def start(self, requests: Sequence[Request], sampling: Sampling) -> Iterator[tuple[int, list[Completion]]]:
        """Each rank answers its share, one batch at a time, as the answers are read."""
        mine = range(dist.get_rank(), len(requests), dist.get_world_size())
        number = self.work.begin()
        for i, completions in self.generate([requests[i] for i in mine], sampling):
            yield mine[i], completions
        self.work.end(number)

    @torch.no_grad()
    def generate(self, requests: Sequence[Request], sampling: Sampling) -> Iterator[tuple[int, list[Completion]]]:
        """(index of the request, its completions), for the requests of this rank. Not collective."""
        assert self._version is not None, "load_weights comes first"
        for batch in self._batches(requests):
            rows = self._decode([requests[i] for i in batch], sampling)
            yield from zip(batch, rows, strict=True)

    def health(self) -> list[EngineHealth]:
        return [EngineHealth("embedded", "empty" if self._version is None else "serving")]

    def close(self) -> None:
        """Do nothing: the model is freed with this object."""

    def _batches(self, requests: Sequence[Request]) -> list[list[int]]:
        """Requests of like length together, at most `batch_rows` rows each (a larger request is a batch of its own)."""
        batches: list[list[int]] = []
        room = 0
        for i in sorted(range(len(requests)), key=lambda i: _prefilled(requests[i])):
            if not batches or requests[i].samples > room:
                batches.append([])
                room = self._batch_rows
            batches[-1].append(i)
            room -= requests[i].samples
        return batches

    def _decode(self, requests: list[Request], sampling: Sampling) -> list[list[Completion]]:
        prefilled, copies = _prefills(requests)
        prompts, mask = _left_padded(prefilled, self._device)
        self.counted.add(mask.numel(), int(mask.numel() - mask.sum()))
        cache = new_cache()
        routers = self._routers if sampling.with_experts else None
        if self._routers is not None:
            self._routers.is_on = routers is not None
        logits = self._forward(prompts, mask, cache, mask.cumsum(1).sub(1).clamp(min=0))
        copies = copies.to(self._device)
        cache.batch_select_indices(copies)
        decoding = _Decoding.begin(requests, mask[copies], sampling, self._device)
        decoding.texts = self._texts(requests, sampling.stop)
        if routers is not None:
            count, more = len(decoding.lengths), sampling.max_tokens
            rows = decoding.row.tolist()
            decoding.experts = RecordedExperts.begin(routers.take(len(mask)), mask, copies, rows, count, more)
        logits = logits[copies]
        while True:
            progress_marker.mark()
            tokens = decoding.sample(logits, sampling, self._end_tokens)
            if decoding.ended.all():
                break
            kept = decoding.drop_ended()
            if kept is not None:
                cache.batch_select_indices(kept)
                tokens = tokens[kept]
            decoding.grow()
            self.counted.add(len(tokens), int(decoding.ended.sum()))
            positions = decoding.mask.sum(1, keepdim=True) - 1
            logits = self._forward(tokens[:, None], decoding.mask, cache, positions)
            if routers is not None and decoding.experts is not None:
                decoding.experts.add(decoding.row, positions[:, 0], routers.take(len(tokens)))
        decoding.check_finite()
        return decoding.completions(requests, self._version or 0)

    def _texts(self, requests: list[Request], stop: tuple[str, ...]) -> list[StopText] | None:
        """The text of each row, to find stop strings in; None if there are no stop strings."""
        if not stop:
            return None
        if self._stops is None or self._stops.strings != stop:
            self._stops = StopStrings(self._folder, stop)
        texts = self._stops.texts([request.token_ids for request in requests for _ in range(request.samples)])
        rows = iter(texts)
        for request in requests:
            for text, begun in zip(islice(rows, request.samples), request.begun or repeat(None), strict=False):
                for token in [] if begun is None else begun.token_ids.tolist():
                    text.ends_with(token)
        return texts

    def _forward(self, tokens: Tensor, mask: Tensor, cache: Any, positions: Tensor) -> Tensor:
        """Logits of the last position: float32 [rows, vocabulary]."""
        out = self._model(
            input_ids=tokens,
            attention_mask=mask,
            position_ids=positions,
            use_cache=True,
            logits_to_keep=1,
            **{self._cache_argument: cache},
        )
        return out.logits[:, -1].float()


@dataclass(slots=True)
class _Decoding:
    """The rows being decoded. `row`: each live row's index in the answer. Ended rows stay until they are dropped."""

    mask: Tensor  # int64 [live, tokens so far]
    row: Tensor  # int64 [live]
    ended: Tensor  # bool [live]
    uniforms: Tensor  # float64 [rows, max_tokens]: the randomness of each token
    tokens: Tensor  # int64 [rows, max_tokens]
    logprobs: Tensor  # float32 [rows, max_tokens]
    lengths: Tensor  # int64 [rows]
    limits: Tensor  # int64 [rows]: the length at which a row is paused, if not ended
    stopped: Tensor  # bool [rows]
    finite: Tensor  # bool [], whether all logits so far were finite
    texts: list[StopText] | None = None  # of the rows, where stop strings end responses
    experts: RecordedExperts | None = None  # of the rows, where the sampling asks for them

    @classmethod
    def begin(cls, requests: list[Request], mask: Tensor, sampling: Sampling, device: torch.device) -> _Decoding:
        generators = [torch.Generator().manual_seed(request.seed) for request in requests]
        uniforms = torch.cat(
            [
                torch.rand(request.samples, sampling.max_tokens, generator=generator, dtype=torch.float64)
                for request, generator in zip(requests, generators, strict=True)
            ]
        )
        rows, longest = len(uniforms), sampling.max_tokens
        begun = [one for request in requests for one in request.begun or [None] * request.samples]
        more = [request.pause_after or longest for request in requests for _ in range(request.samples)]
        lengths = torch.tensor([0 if one is None else len(one.token_ids) for one in begun])
        tokens, logprobs = torch.zeros(rows, longest, dtype=torch.int64), torch.zeros(rows, longest)
        for row, one in enumerate(begun):
            if one is not None:
                tokens[row, : lengths[row]], logprobs[row, : lengths[row]] = one.token_ids.long(), one.logprobs
        live = torch.tensor([one is None or one.finish_reason == UNFINISHED for one in begun])
        return cls(
            mask=mask,
            row=live.nonzero().flatten().to(device),
            ended=torch.zeros(int(live.sum()), dtype=torch.bool, device=device),
            uniforms=uniforms.to(device),
            tokens=tokens.to(device),
            logprobs=logprobs.to(device),
            lengths=lengths.to(device),
            limits=(lengths + torch.tensor(more)).clamp(max=longest).to(device),
            stopped=torch.tensor([one is not None and one.finish_reason == "stop" for one in begun], device=device),
            finite=torch.tensor(True, device=device),
        )

    def sample(self, logits: Tensor, sampling: Sampling, end_tokens: Tensor) -> Tensor:
        """Sample each live row's next token and record it for rows not ended."""
        step = self.lengths[self.row].clamp(max=self.tokens.shape[1] - 1)  # of an ended row: any
        tokens, logprobs = self._drawn(logits, step, sampling)
        live = ~self.ended
        at, step = self.row[live], step[live]
        self.tokens[at, step] = tokens[live]
        self.logprobs[at, step] = logprobs.gather(1, tokens[:, None]).squeeze(1)[live]
        self.lengths[at] = step + 1
        ends = torch.isin(tokens, end_tokens)
        if self.texts is not None:
            ends |= self._stopped_by_text(tokens)
        ends &= live
        self.stopped[self.row[ends]] = True
        self.ended |= ends | (self.lengths[self.row] >= self.limits[self.row])
        return tokens

    def _drawn(self, logits: Tensor, step: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
        """Each live row's next token, int64 [live], by inverting the distribution function, and log-probabilities."""
        if not sampling.temperature:
            self.finite &= logits.isfinite().all()
            return logits.argmax(dim=1), logits.log_softmax(dim=1)
        if sampling.truncation is not None:
            least = lowest_kept(logits, sampling.temperature, sampling.truncation)
            logits = logits.masked_fill(logits < least[:, None], -torch.inf)
        logprobs = (logits / sampling.temperature).log_softmax(dim=1)
        # In float64: over a large vocabulary, float32 sums would lose the probability of the tail tokens.
        cumulative = logprobs.double().exp().cumsum(1)
        self.finite &= cumulative[:, -1].isfinite().all()  # the sum is NaN if a logit is NaN or infinite
        point = self.uniforms[self.row, step, None] * cumulative[:, -1:]
        tokens = torch.searchsorted(cumulative, point, right=True).squeeze(1)
        return tokens.clamp(max=logits.shape[1] - 1), logprobs

    def _stopped_by_text(self, tokens: Tensor) -> Tensor:
        """Whether the text of each live row has a stop string with its new token: bool [live]; False of ended rows."""
        assert self.texts is not None
        rows, ended = self.row.tolist(), self.ended.tolist()
        found = [
            not has_ended and self.texts[row].ends_with(token)
            for row, has_ended, token in zip(rows, ended, tokens.tolist(), strict=True)
        ]
        return torch.tensor(found, dtype=torch.bool, device=tokens.device)

    def check_finite(self) -> None:
        """Raise EngineError if logits were not finite: the tokens would be noise."""
        if not self.finite:
            raise EngineError(
                "the engine's logits are not finite: the weights have overflowed, or do not fit the precision; look at "
                "the last iterations' gradient norms, or take run.precision=bf16 or fp32"
            )

    def drop_ended(self) -> Tensor | None:
        """Drop the ended rows once there are enough. Returns int64, the indices of the rows that remain; else None."""
        if int(self.ended.sum()) < ENDED_SHARE * len(self.ended):
            return None
        if not self.ended.any():
            return None
        kept = (~self.ended).nonzero().flatten()
        self.mask, self.row, self.ended = self.mask[kept], self.row[kept], self.ended[kept]
        return kept

    def grow(self) -> None:
        self.mask = torch.cat([self.mask, torch.ones_like(self.mask[:, :1])], dim=1)

    def completions(self, requests: list[Request], version: int) -> list[list[Completion]]:
        lengths, stopped = self.lengths.tolist(), self.stopped.tolist()
        written = torch.arange(self.tokens.shape[1], device=self.tokens.device) < self.lengths[:, None]
        tokens = self.tokens[written].to(torch.int32).cpu().split(lengths)
        logprobs = self.logprobs[written].cpu().split(lengths)
        begun = [one for request in requests for one in request.begun or [None] * request.samples]
        prompts = [len(request.token_ids) for request in requests for _ in range(request.samples)]
        longest = self.tokens.shape[1]
        flat = []
        for i, (one, n) in enumerate(zip(begun, lengths, strict=True)):
            reason = "stop" if stopped[i] else "length" if n == longest else UNFINISHED
            experts = None if self.experts is None else self.experts.of(i, prompts[i], n, one)
            flat.append(Completion(tokens[i], logprobs[i], reason, grown(one, version, n), experts))
        answers, at = [], 0
        for request in requests:
            answers.append(flat[at : at + request.samples])
            at += request.samples
        return answers


def _published(model: Any) -> dict[str, Tensor]:
    """A model's parameters by the names of published folders: these have a tensor for each expert and projection,
    where transformers has one for all experts of a layer."""
    found: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        layer, _, kind = name.rpartition(".experts.")
        if layer and kind in ("gate_up_proj", "down_proj"):
            parts = ("gate_proj", "up_proj") if kind == "gate_up_proj" else (kind,)
            for expert, of_expert in enumerate(parameter.unbind(0)):
                for part, tensor in zip(parts, of_expert.chunk(len(parts)), strict=True):
                    found[f"{layer}.experts.{expert}.{part}.weight"] = tensor
        else:
            found[name] = parameter
    return found


def _rows(parameters: dict[str, Tensor], name: str) -> Tensor | None:
    """The parameter that a tensor of a bucket is for, or its rows that the tensor is a part of."""
    if not isinstance(name, PartName):
        return parameters.get(name)
    whole = parameters.get(name.whole)
    return None if whole is None or len(whole) != name.rows else whole[name.start : name.stop]


def _prefilled(request: Request) -> int:
    """Tokens of the longest row that the prefill of a request has."""
    return len(request.token_ids) + max((len(one.token_ids) for one in request.begun), default=0)


def _prefills(requests: Sequence[Request]) -> tuple[list[Sequence[int]], Tensor]:
    """The rows of a prefill, and for each row that is decoded its row there: int64 [rows].

    Samples that begin share the row of their prompt. One that continues has a row of its own, with its tokens so far.
    """
    rows: list[Sequence[int]] = []
    copies: list[int] = []
    for request in requests:
        if not request.begun:
            copies += [len(rows)] * request.samples
            rows.append(request.token_ids)
        for one in request.begun:
            if one.finish_reason == UNFINISHED:
                copies.append(len(rows))
                rows.append([*request.token_ids, *one.token_ids.tolist()])
    return rows, torch.tensor(copies, dtype=torch.int64)


def _left_padded(prompts: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Tokens and mask, int64 [prompts, longest], with padding before each prompt."""
    longest = max(map(len, prompts))
    tokens = torch.tensor([[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts], device=device)
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device)
    return tokens, mask
