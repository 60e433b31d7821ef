"""A user's rollout engine (`config.extensions.load_engine`) as an `Engine`. Its return values are checked."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch.distributed as dist
from torch import Tensor

from megatron_tempo.config.extensions import (
    Extension,
    ExtensionError,
    call_failed,
    load_engine,
    shown,
    wrong_result,
)
from megatron_tempo.config.routing import RoutingFormat
from megatron_tempo.errors import EngineError, InputError
from megatron_tempo.rollout.answer_checks import doubts, without_rounding
from megatron_tempo.rollout.arrays import expert_tensor, logprob_tensor, run_tuples, token_tensor
from megatron_tempo.rollout.engine import EngineSetup, EngineWork, Request, Sampling
from megatron_tempo.rollout.experts import doubts as doubtful_experts
from megatron_tempo.types import Completion, EngineHealth, TokenCount, Weights


class ImportedEngine:
    """An `Engine`. Its errors name the extension. If answers are wrong on one rank, all ranks raise EngineError.

    Exceptions of the user's `load_weights`, `health` and `close` pass unchanged, with their tracebacks.
    """

    asleep = False

    def __init__(
        self, extension: Extension, setup: EngineSetup, vocab: int, routing: RoutingFormat | None = None
    ) -> None:
        """`vocab`: number of tokens that a response may contain. `routing`: of the experts that it has to return.

        Raises ExtensionError. Collective.
        """
        self._extension, self._vocab, self._routing = extension, vocab, routing
        try:
            self._engine = load_engine(extension).make(setup)
        except InputError:
            raise
        except Exception as error:
            raise call_failed(extension, error) from error
        counted, replicas = getattr(self._engine, "counted", None), getattr(self._engine, "replicas", 1)
        if not isinstance(counted, TokenCount | None):
            raise ExtensionError(f"{extension}: counted is {shown(counted)}", "self.counted = TokenCount()")
        if type(replicas) is not int or replicas < 1:
            raise ExtensionError(f"{extension}: replicas is {shown(replicas)}", "self.replicas = 1 or more models")
        self._counts_itself = counted is not None
        self.counted = TokenCount() if counted is None else counted
        self.work = EngineWork()
        self.replicas: int = replicas
        self._version = -1

    def start(self, requests: Sequence[Request], sampling: Sampling) -> Iterator[tuple[int, list[Completion]]]:
        started: Iterable[Any] = ()
        failure: Exception | None = None
        work = self.work.begin()
        try:
            given: Any = self._engine.start(requests, sampling)
            if not isinstance(given, Iterable):
                raise wrong_result(self._extension, given, "an iterator of (number of the request, completions)")
            started = given
        except Exception as error:  # noqa: BLE001 - reported to the other ranks when the answers are read
            failure = error
        return self._answers(started, requests, sampling, self._version, failure, work)

    def sleep(self) -> None:
        """It keeps its memory: see `Engine`."""

    def load_weights(self, weights: Weights, version: int) -> None:
        self._engine.load_weights(weights, version)
        self._version = version

    def differences(self, weights: Weights) -> list[tuple[str, float]] | None:
        differences: Any = self._engine.differences(weights)
        if differences is None:
            return None
        expected = "a list of (name of a tensor, relative difference), or None"
        if not isinstance(differences, list):
            raise wrong_result(self._extension, differences, expected)
        for item in differences:
            match item:
                case (str(), int() | float()):
                    continue
            raise wrong_result(self._extension, item, expected)
        return differences

    def health(self) -> list[EngineHealth]:
        states: Any = self._engine.health()
        if not isinstance(states, list) or not all(isinstance(state, EngineHealth) for state in states):
            raise wrong_result(self._extension, states, "a list of megatron_tempo.types.EngineHealth")
        return states

    def close(self) -> None:
        self._engine.close()

    def _answers(
        self,
        started: Iterable[Any],
        requests: Sequence[Request],
        sampling: Sampling,
        oldest: int,
        failure: Exception | None,
        work: int,
    ) -> Iterator[tuple[int, list[Completion]]]:
        """The answers of this rank. At the end the ranks compare: all raise, or each request has one answer.

        `work`: the requests' number in `EngineWork`.
        """
        numbers: list[int] = []
        try:
            for item in started:
                number, completions = self._checked(item, requests, sampling, oldest)
                numbers.append(number)
                if not self._counts_itself:
                    self.counted.add(sum(len(completion.token_ids) for completion in completions), 0)
                yield number, completions
        except Exception as error:  # noqa: BLE001 - all ranks raise it below
            failure = error
        self.work.end(work)
        shares: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(shares, (failure and self._describe(failure), numbers))
        if failures := [words for words, _ in shares if words is not None]:
            raise EngineError(failures[0]) from failure
        answered = Counter(number for _, own in shares for number in own)
        if wrong := [number for number in range(len(requests)) if answered[number] != 1]:
            first = f"answered request {wrong[0]} {answered[wrong[0]]} times over all ranks"
            raise EngineError(f"{self._extension} {first}; fix: answer each request on one rank, once")

    def _describe(self, error: Exception) -> str:
        known = isinstance(error, EngineError | InputError)
        return str(error) if known else str(call_failed(self._extension, error))

    def _checked(
        self, item: object, requests: Sequence[Request], sampling: Sampling, oldest: int
    ) -> tuple[int, list[Completion]]:
        match item:
            case (int(number), list(completions)) if 0 <= number < len(requests):
                pass
            case _:
                expected = f"(number of the request from 0 to {len(requests) - 1}, list of Completion)"
                raise wrong_result(self._extension, item, expected)
        request, samples = requests[number], requests[number].samples
        if len(completions) != samples or not all(isinstance(c, Completion) for c in completions):
            raise wrong_result(self._extension, completions, f"{samples} of megatron_tempo.types.Completion, as asked")
        return number, [self._converted(completion, request, sampling, oldest) for completion in completions]

    def _converted(self, given: Completion, request: Request, sampling: Sampling, oldest: int) -> Completion:
        """What the user's engine returned, as tensors and checked. Its tensors are not changed."""
        try:
            completion = Completion(
                token_tensor(given.token_ids),
                logprob_tensor(given.logprobs),
                given.finish_reason,
                run_tuples(given.versions),
                self._experts(given, request) if sampling.with_experts else None,
            )
            wrong = doubts(completion, sampling.max_tokens, self._vocab, range(oldest, self._version + 1))
        except ValueError as error:  # not sequences of numbers
            wrong = [str(error)]
        if wrong:
            raise ExtensionError(
                f"{self._extension} returned a response that makes no sense: {'; '.join(wrong)}",
                "correct what its Completion holds",
            )
        return without_rounding(completion)

    def _experts(self, given: Completion, request: Request) -> Tensor:
        """The experts of a response. Raises ValueError or ExtensionError."""
        assert self._routing is not None
        if given.experts is None:
            raise ExtensionError(
                f"{self._extension} returned no experts: model.router_replay uses those that its routers chose",
                "experts=... in its Completion, or model.router_replay=off",
            )
        experts = expert_tensor(given.experts, self._routing.itemsize)
        if wrong := doubtful_experts(experts, self._routing):
            raise ValueError(wrong[0])
        if len(experts) >= len(request.token_ids) + len(given.token_ids):
            raise ValueError(f"experts of {len(experts)} tokens, but the last one of a response has passed no router")
        return experts
