"""The data types that all folders share, each with an example.

A prompt with an answer and a prompt without one are different types. Training on unlabelled questions uses only
`UnlabelledPrompt`, which has no field for an answer.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class UnlabelledPrompt:
    """A question without an answer.

    >>> UnlabelledPrompt(id="u:3", text="2 4 5 > 13 :", token_ids=(5, 7, 8, 62, 16, 63))
    """

    id: str
    text: str
    token_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class LabelledPrompt:
    """A question, its answer, and the name of the verifier that compares a response with it.

    >>> LabelledPrompt(id="aime:1", text="Find 1+1.", token_ids=(9, 4), answer="2", verifier="math")
    """

    id: str
    text: str
    token_ids: tuple[int, ...]
    answer: str
    verifier: str


UNFINISHED = "unfinished"  # the `finish_reason` of a response that is to continue


@dataclass(frozen=True, slots=True, eq=False)
class Completion:
    """One sampled response of t tokens, as an engine returns it. Its tensors are on the CPU.

    `experts`: the experts that the engine's routers chose for prompt and response, as `config.routing` stores them;
    None if they are not recorded. Each token's are those of the pass that computed the log-probability of the token
    after it. The last token of a response has passed no router.

    `logprobs[i]`: log pi(token_ids[i] | prompt, token_ids[:i]) in nats, after temperature, over the tokens that top-p,
    top-k and min-p leave. `versions`: the weights that generated the tokens, as (version, number of tokens) in order;
    the version is the run's iteration. `finish_reason`: "stop" (the response ends with an end token, or with the token
    that completes a stop string; both are part of it), "length", or, between two phases of generation, UNFINISHED.

    >>> Completion(token_ids=[12, 66], logprobs=[-0.7, -0.01], finish_reason="stop", versions=((40, 2),))
    """

    token_ids: Tensor  # int32 [t]; may be a view of an array of several completions, as logprobs may be
    logprobs: Tensor  # float32 [t]
    finish_reason: str
    versions: tuple[tuple[int, int], ...]
    experts: Tensor | None = None  # uint8 or int16 [prompt + t - 1 or fewer, layers, k]

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the own tokens only. A tensor would be pickled with all of the array that it is a view of."""
        experts = None if self.experts is None else self.experts.numpy()
        arrays = (self.token_ids.numpy(), self.logprobs.numpy(), experts)
        return _unpickled, (*arrays, self.finish_reason, self.versions)


def _unpickled(
    token_ids: Any, logprobs: Any, experts: Any, finish_reason: str, versions: tuple[tuple[int, int], ...]
) -> Completion:
    tensors = [None if array is None else torch.from_numpy(array) for array in (token_ids, logprobs, experts)]
    assert tensors[0] is not None
    assert tensors[1] is not None
    return Completion(tensors[0], tensors[1], finish_reason, versions, tensors[2])


@dataclass(slots=True)
class TokenCount:
    """Tokens that a model has processed, and how many of them were padding.

    >>> TokenCount(tokens=512, padding=3)
    """

    tokens: int = 0
    padding: int = 0

    def add(self, tokens: int, padding: int) -> None:
        self.tokens += tokens
        self.padding += padding

    def padding_since(self, earlier: TokenCount) -> float:
        """The share of padding among the tokens counted after `earlier`."""
        return (self.padding - earlier.padding) / max(self.tokens - earlier.tokens, 1)

    @staticmethod
    def total(counts: Iterable[TokenCount]) -> TokenCount:
        """The sum of the counts, as an independent copy."""
        total = TokenCount()
        for count in counts:
            total.add(count.tokens, count.padding)
        return total


@dataclass(frozen=True, slots=True)
class Owners:
    """The data-parallel rank that computes each row of a batch, in the layouts of actor and critic: int64 [n] each."""

    actor: Tensor
    critic: Tensor

    @staticmethod
    def join(first: Owners, second: Owners) -> Owners:
        return Owners(torch.cat([first.actor, second.actor]), torch.cat([first.critic, second.critic]))

    def select(self, rows: Tensor) -> Owners:
        return Owners(self.actor[rows], self.critic[rows])


@dataclass(frozen=True, slots=True)
class Batch:
    """Rollouts of n responses, on the CPU: the columns of all rows on every rank, the tokens only of the rows it holds.

    Row numbers count all rows, so mini-batches, rewards and metrics are the same on every rank. Tokens are jagged:
    those of the held rows one after another, in ascending order of the rows, without padding. Results of a model, such
    as values, follow the same order; a rank has them for the rows that it owns.

    Two rows, prompts (5, 6) and (7,), responses (1, 2, 3) and (4,), on a rank that holds both:

    >>> Batch(prompt_ids=("a", "b"), group=[0, 1], prompt_tokens=[5, 6, 7], prompt_lengths=[2, 1],
    ...       response_tokens=[1, 2, 3, 4], response_lengths=[3, 1], engine_logprobs=[-.1, -.2, -.3, -.4],
    ...       stopped=[True, False], versions=[[0, 40, 2], [0, 41, 1], [1, 41, 1]], correct=[1., 0.])

    Shapes: n rows, of which m are held, with P prompt tokens and T response tokens in total.
    """

    prompt_ids: tuple[str, ...]  # n: the id of each row's prompt
    group: Tensor  # int64 [n]: rows with the same number answer the same prompt
    prompt_tokens: Tensor  # int32 [P]
    prompt_lengths: Tensor  # int64 [n]
    response_tokens: Tensor  # int32 [T]
    response_lengths: Tensor  # int64 [n]
    engine_logprobs: Tensor  # float32 [T]: engine log-probabilities
    stopped: Tensor  # bool [n]: the response ends with an end token or a stop string
    # int64 [runs, 3], of all rows: row, version of the weights that generated the tokens (the run's iteration; -1:
    # unknown), number of tokens; in order
    versions: Tensor
    correct: Tensor | None = None  # float32 [n] in [0, 1]: the verifier's verdict; None for unlabelled prompts
    # int64 [n]: equal numbers are equal answers to a prompt; -1: no answer; None: answers were not compared
    answer_class: Tensor | None = None
    held: Tensor = None  # type: ignore[assignment]  # int64 [m]: the held rows, ascending; not given: all rows
    owners: Owners | None = None  # None: every rank holds all rows, and a model divides them itself
    # uint8 or int16 [P + T, layers, k], of each held row prompt and response: the experts that the engine chose in the
    # layers of this rank's actor (`config.routing`); None: not recorded
    experts: Tensor | None = None

    def __post_init__(self) -> None:
        if self.held is None:
            object.__setattr__(self, "held", torch.arange(len(self)))

    def __len__(self) -> int:
        return len(self.prompt_ids)

    @property
    def lengths(self) -> Tensor:
        """Tokens of each row, prompt and response: int64 [n]."""
        return self.prompt_lengths + self.response_lengths

    def staleness(self, version: int) -> Tensor:
        """How much older than `version` the oldest token of each row is: int64 [n]; 0 if it is unknown."""
        oldest = torch.full((len(self),), version)
        known = self.versions[self.versions[:, 1] >= 0]
        return version - oldest.scatter_reduce(0, known[:, 0], known[:, 1], "amin")

    @property
    def held_responses(self) -> Tensor:
        """Response tokens of each held row: int64 [m]."""
        return self.response_lengths[self.held]

    @property
    def places(self) -> Tensor:
        """The place of each row among the held ones, -1 for a row that is not held: int64 [n]."""
        return torch.full((len(self),), -1).index_put((self.held,), torch.arange(len(self.held)))

    def prompts(self) -> Sequence[Tensor]:
        """The prompt of each held row."""
        return self.prompt_tokens.split(self.prompt_lengths[self.held].tolist())

    def responses(self) -> Sequence[Tensor]:
        """The response of each held row."""
        return self.response_tokens.split(self.held_responses.tolist())

    def rows(self) -> Iterator[Tensor]:
        """Prompt and response of each held row, concatenated: int32 [prompt + response]."""
        for prompt, response in zip(self.prompts(), self.responses(), strict=True):
            yield torch.cat((prompt, response))

    @staticmethod
    def join(first: Batch, second: Batch) -> Batch:
        """The rows of both, without verdicts and answer classes: a batch to train the actor on."""
        shift = int(first.group.max()) + 1 if len(first) else 0
        owned = first.owners is not None and second.owners is not None
        return Batch(
            prompt_ids=first.prompt_ids + second.prompt_ids,
            group=torch.cat([first.group, second.group + shift]),
            prompt_tokens=torch.cat([first.prompt_tokens, second.prompt_tokens]),
            prompt_lengths=torch.cat([first.prompt_lengths, second.prompt_lengths]),
            response_tokens=torch.cat([first.response_tokens, second.response_tokens]),
            response_lengths=torch.cat([first.response_lengths, second.response_lengths]),
            engine_logprobs=torch.cat([first.engine_logprobs, second.engine_logprobs]),
            stopped=torch.cat([first.stopped, second.stopped]),
            versions=torch.cat([first.versions, second.versions + torch.tensor([len(first), 0, 0])]),
            held=torch.cat([first.held, second.held + len(first)]),
            owners=Owners.join(first.owners, second.owners) if owned else None,  # type: ignore[arg-type]
            experts=_both(first, second),
        )

    def select(self, rows: Tensor) -> Batch:
        """The given rows, in the given order. `rows`: int64 [m]. Of these, the rank holds those that it holds here."""
        places = self.places[rows]
        held = (places >= 0).nonzero().flatten()
        chosen = places[held]
        prompts, responses = self.prompt_lengths[self.held], self.held_responses
        return Batch(
            prompt_ids=tuple(self.prompt_ids[i] for i in rows.tolist()),
            group=self.group[rows],
            prompt_tokens=picked(self.prompt_tokens, prompts, chosen),
            prompt_lengths=self.prompt_lengths[rows],
            response_tokens=picked(self.response_tokens, responses, chosen),
            response_lengths=self.response_lengths[rows],
            engine_logprobs=picked(self.engine_logprobs, responses, chosen),
            stopped=self.stopped[rows],
            versions=self._versions_of(rows),
            correct=None if self.correct is None else self.correct[rows],
            answer_class=None if self.answer_class is None else self.answer_class[rows],
            held=held,
            owners=None if self.owners is None else self.owners.select(rows),
            experts=None if self.experts is None else picked(self.experts, self.lengths[self.held], chosen),
        )

    def _versions_of(self, rows: Tensor) -> Tensor:
        counts = torch.bincount(self.versions[:, 0], minlength=len(self))
        starts = (counts.cumsum(0) - counts)[rows]
        runs = self.versions[ranges(starts, counts[rows])]
        return torch.cat([torch.repeat_interleave(torch.arange(len(rows)), counts[rows])[:, None], runs[:, 1:]], dim=1)


def _both(first: Batch, second: Batch) -> Tensor | None:
    """The experts of two batches, both recorded or neither."""
    assert (first.experts is None) == (second.experts is None)
    return None if first.experts is None or second.experts is None else torch.cat([first.experts, second.experts])


def picked(flat: Tensor, lengths: Tensor, rows: Tensor) -> Tensor:
    """The given rows (int64 [k]) of a flat tensor of rows of these lengths (int64 [m]), one after another."""
    parts = flat.split(lengths.tolist())
    return torch.cat([parts[i] for i in rows.tolist()]) if len(rows) else flat[:0]


def ranges(starts: Tensor, lengths: Tensor) -> Tensor:
    """Concatenates the ranges start, start + 1, ... of `length` numbers for each pair: int64 [sum of lengths]."""
    offsets = lengths.cumsum(0) - lengths
    return torch.arange(int(lengths.sum())) + torch.repeat_interleave(starts - offsets, lengths)


@dataclass(frozen=True, slots=True)
class EngineHealth:
    """The state of one server or engine."""

    name: str
    # starting, empty (without weights yet), serving, gone (given up); colocated ones: asleep, waking (before serving)
    state: str
    requests: int = 0  # in progress
    restarts: int = 0  # since its last complete weight update
    address: str = ""


class PartName(str):
    """The name of consecutive rows of a tensor, where a bucket has only a part of it.

    Rows `start` to `stop` of the `rows` rows of `whole`. Parts of a tensor follow one another in the order of its rows.

    >>> PartName("lm_head.weight", 4096, 8192, 151936)
    'lm_head.weight[4096:8192]'
    """

    whole: str
    start: int
    stop: int
    rows: int

    def __new__(cls, whole: str, start: int, stop: int, rows: int) -> PartName:
        name = super().__new__(cls, f"{whole}[{start}:{stop}]")
        name.whole, name.start, name.stop, name.rows = whole, start, stop, rows
        return name

    def __getnewargs__(self) -> tuple[str, int, int, int]:  # type: ignore[override]  # for pickle
        return self.whole, self.start, self.stop, self.rows


def whole_name(name: str) -> str:
    """The name of the tensor that a tensor of a bucket is, or is a part of."""
    return name.whole if isinstance(name, PartName) else name


# Tensors of a model by their Hugging Face names. Names of parts are `PartName`s, in streams that are asked for parts.
Bucket = list[tuple[str, Tensor]]


@dataclass(frozen=True, slots=True)
class Share:
    """Some of the `count` shares of about equal size into which a pipeline stage's buckets are divided: `taken`.

    `senders`: the copies of the model that may send at the same time on this machine, None for all copies.

    >>> Share(count=3, taken=(0,))
    """

    count: int = 1
    taken: tuple[int, ...] = (0,)
    senders: int | None = None


class Weights(Protocol):
    """A model's current weights, by their Hugging Face names, in buckets of bounded size.

    Both methods are collective, and can be called repeatedly.
    """

    @property
    def sends(self) -> bool:
        """Whether this rank is the one of its stage and copy that gets buckets from `from_stages`."""
        ...

    @property
    def copies(self) -> int:
        """How many groups of ranks hold the whole model and can send it."""
        ...

    @property
    def copy(self) -> int:
        """The number of this rank's copy."""
        ...

    def everywhere(self, *, parts: bool = False) -> Iterator[Bucket]:
        """All weights on every rank.

        With `parts`, a tensor that is larger than a bucket arrives in parts, each in a bucket of its own. Without, it
        arrives whole, in a bucket that exceeds the bound.
        """
        ...

    def from_stages(self, *, shared: bool = False, parts: bool = False, share: Share | None = None) -> Iterator[Bucket]:
        """All weights, each on one rank: each pipeline stage's own weights on one of its ranks. Others get nothing.

        `share`: what this copy sends of each stage, independently of the other copies. Its ranks all give the same.
        None: the first copy sends everything, and the others nothing. The parts of a tensor are in one share, in order.

        With `shared`, buckets are in memory that this machine's processes can open. On a CPU two buffers are used in
        turn: when you request a bucket, every earlier one except the last may be overwritten.
        """
        ...


# In place of every expert of a token whose choice is not known, by the bytes of an expert's number (`config.routing`).
UNKNOWN_EXPERT = {1: 255, 2: -1}


def known_experts(experts: Tensor) -> Tensor:
    """Which tokens have a recorded choice of experts: uint8 or int16 [..., k] -> bool [...]."""
    return (experts != UNKNOWN_EXPERT[experts.itemsize]).any(-1)


def seed_of(*parts: object) -> int:
    """A seed, 0 <= seed < 2**63, that depends only on the text of the parts.

    All random draws of a run use such seeds, named after their purpose. So no generator state has to be carried from
    one iteration, process or layout to another.
    """
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
