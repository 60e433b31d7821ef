"""A rollout engine: transformers' own generate(), with nucleus sampling off and one request at a time.

    rollout.engine=import:generate_engine:GenerateEngine

It is slower than the built-in engines, and shows what an engine must do: hold the weights that it is given, answer
requests with token ids and log-probabilities, and say how it is.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from megatron_tempo.rollout.embedded import end_tokens
from megatron_tempo.rollout.engine import EngineSetup, Request, Sampling
from megatron_tempo.runtime import progress_marker
from megatron_tempo.types import Completion, EngineHealth, Weights


class GenerateEngine:
    """One is made in each process of the trainer, and all ranks call its methods together."""

    sampling = ("top_p", "top_k", "seed")  # settings besides a temperature above 0 that it keeps

    def __init__(self, setup: EngineSetup) -> None:
        """`setup.model` is a folder to read the configuration from. The weights come by `load_weights`."""
        config = AutoConfig.from_pretrained(setup.model)
        self.model = AutoModelForCausalLM.from_config(config, dtype=setup.dtype).to(setup.device).eval()
        self.device, self.ends = setup.device, end_tokens(setup.model)
        self.version: int | None = None

    @torch.no_grad()
    def load_weights(self, weights: Weights, version: int) -> None:
        """Copy the trainer's weights, which come in buckets under Hugging Face's names."""
        parameters = dict(self.model.named_parameters(remove_duplicate=False))
        for bucket in weights.everywhere():
            for name, tensor in bucket:
                parameters[name].copy_(tensor)
        self.version = version

    def differences(self, weights: Weights) -> list[tuple[str, float]] | None:
        """Optional check after a restart: the tensors that differ from `weights`. None: not known."""
        return None

    def start(self, requests: Sequence[Request], sampling: Sampling) -> Iterator[tuple[int, list[Completion]]]:
        """Yield (number of the request, its completions). All ranks get all requests; each answers its own."""
        for number in range(dist.get_rank(), len(requests), dist.get_world_size()):
            yield number, self.answer(requests[number], sampling)
            progress_marker.mark()  # the watchdog ends a run that marks no progress for run.hang_minutes

    @torch.no_grad()
    def answer(self, request: Request, sampling: Sampling) -> list[Completion]:
        """`request.samples` responses to one prompt, from the request's own seed."""
        prompt = torch.tensor([request.token_ids], device=self.device)
        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(request.seed)
            out = self.model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                do_sample=True,
                temperature=sampling.temperature,
                top_k=sampling.top_k or 0,
                top_p=sampling.top_p,
                max_new_tokens=sampling.max_tokens,
                num_return_sequences=request.samples,
                eos_token_id=self.ends,
                pad_token_id=self.ends[0],
                output_scores=True,
                return_dict_in_generate=True,
            )
        tokens = out.sequences[:, prompt.shape[1] :]
        logprobs = torch.stack(out.scores, dim=1).float().log_softmax(-1).gather(2, tokens[..., None]).squeeze(2)
        return [self.completion(*row) for row in zip(tokens.int().cpu(), logprobs.cpu(), strict=True)]

    def completion(self, tokens: Tensor, logprobs: Tensor) -> Completion:
        """A row up to its first end token. Behind it is padding."""
        ends = torch.isin(tokens, torch.tensor(self.ends)).nonzero()
        n = int(ends[0]) + 1 if len(ends) else len(tokens)
        assert self.version is not None, "load_weights comes first"
        return Completion(tokens[:n], logprobs[:n], "stop" if len(ends) else "length", ((self.version, n),))

    def health(self) -> list[EngineHealth]:
        return [EngineHealth("generate", "empty" if self.version is None else "serving")]

    def close(self) -> None:
        """Called at the end of the run."""
