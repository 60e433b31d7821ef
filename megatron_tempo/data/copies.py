"""Questions that are in several sets of a configuration: the same ones, in any typesetting, and near copies.

Questions are the same if they have the same `question_keys.matching_key`. A near copy shares half of its shingles,
which are runs of four words. Shingles that many questions share are ignored, so questions made from one template are
not copies.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from zlib import crc32

from megatron_tempo.config.schema import Config, DatasetConfig
from megatron_tempo.config.tree import MISSING
from megatron_tempo.data.question_keys import matching_key, tokens
from megatron_tempo.data.question_rows import question_texts

SHINGLE = 4  # words
MIN_SHINGLES = 6  # own shingles that a question needs: fewer are not enough evidence
SHARED = 0.5  # of the shingles of the shorter question
COMMON = 4  # questions of a set that may share a shingle: with more, it is a common phrase or part of a template

CHECKED_BYTES = 8 << 20
LABELLED, UNLABELLED = "data.labelled", "data.unlabelled"


@dataclass(frozen=True, slots=True)
class Copy:
    """A question of one set that is a near copy of one of another. `shared`: share of the shorter one's shingles."""

    first: str
    second: str
    shared: float


@dataclass(frozen=True, slots=True)
class QuestionSet:
    """The questions of a set: their matching keys and their texts, by id."""

    name: str  # of its field
    keys: dict[str, str]
    texts: dict[str, tuple[str, ...]]

    @classmethod
    def read(cls, name: str, dataset: DatasetConfig, *, answers: bool = False) -> QuestionSet:
        """DataError names every bad row; with `answers`, also those without a usable answer."""
        texts = question_texts(dataset, answers=answers)
        return cls(name, {question: matching_key("\n".join(parts)) for question, parts in texts.items()}, texts)


def datasets(config: Config) -> dict[str, DatasetConfig]:
    """The datasets of a configuration that have a file, by the names of their fields, training sets first."""
    training = {LABELLED: config.data.labelled, UNLABELLED: config.data.unlabelled}
    evaluated = {f"evaluation.sets.{name}": dataset for name, dataset in config.evaluation.sets.items()}
    return {name: dataset for name, dataset in (training | evaluated).items() if dataset and dataset.path != MISSING}


def same_questions(a: Mapping[str, str], b: Mapping[str, str]) -> list[tuple[str, str]]:
    """The pairs (id in a, id in b) of the same questions, in the order of `b`. Both are keys by id."""
    known: dict[str, list[str]] = defaultdict(list)
    for name, key in a.items():
        known[key].append(name)
    return [(id_a, id_b) for id_b, key in b.items() for id_a in known.get(key, ())]


def check_data(config: Config) -> list[str]:
    """Findings on the questions of a configuration, one per line. DataError names every bad row.

    If the files have more than `CHECKED_BYTES` in total, the check is left to the start of the run. So is that of sets
    with a user's reader.
    """
    sets = datasets(config)
    if any(dataset.reader is not None for dataset in sets.values()):
        return []
    size = sum(Path(dataset.path).stat().st_size for dataset in sets.values())
    if size > CHECKED_BYTES:
        return [f"the data, {size / 2**20:.0f} MiB, are too large to be looked at here: the run looks at them first"]
    read = [QuestionSet.read(name, dataset, answers=True) for name, dataset in sets.items()]
    by_name = {questions.name: questions for questions in read}
    held = {name: by_name[f"evaluation.sets.{name}"].keys for name in config.data.held_out}
    left_out = [held_out(name, by_name[name].keys, held) for name in (LABELLED, UNLABELLED) if name in by_name]
    return [*filter(None, left_out), *copies_between(read, config.data.held_out)]


def copies_between(sets: Sequence[QuestionSet], held: Sequence[str]) -> list[str]:
    """Warnings of questions of a training set that are also in another set, the same or near copies.

    `held`: the names of evaluation sets whose questions are left out of training.
    """
    evaluated = [one for one in sets if not one.name.startswith("data.")]
    lines = [line for one in evaluated if (line := repeated(one.name, one.keys))]
    near = near_copies(sets)
    for first, second in combinations(sets, 2):
        if not first.name.startswith("data."):  # evaluation sets may share questions
            continue
        if second.name.rpartition(".")[2] not in held:
            lines += _same(first, second)
        if pairs := near.get((first.name, second.name)):
            example = f"{pairs[0].first} and {pairs[0].second} share {pairs[0].shared:.0%} of their wording"
            lines.append(
                f"warning: {len({copy.first for copy in pairs})} questions of {first.name} are near copies of "
                f"questions of {second.name}: {example}; remove them if a score depends on it"
            )
    return lines


def repeated(name: str, keys: Mapping[str, str]) -> str | None:
    """A warning of questions that a set has more than once; None if there are none. `keys`: by id."""
    ids: dict[str, list[str]] = defaultdict(list)
    for one, key in keys.items():
        ids[key].append(one)
    groups = [same for same in ids.values() if len(same) > 1]
    if not groups:
        return None
    return (
        f"warning: {len(groups)} questions of {name} are in it more than once, such as "
        f"{' and '.join(groups[0][:2])}: each copy counts, and the interval of a score takes copies as independent "
        "questions; remove them"
    )


def held_out(name: str, own: Mapping[str, str], held: Mapping[str, Mapping[str, str]]) -> str | None:
    """A message of how many questions of a training set are left out; None if none is.

    `own`: the training set's matching keys by id; `held`: those of each set of `data.held_out`, by its name.
    """
    where = {key: one for one, keys in held.items() for key in keys.values()}
    count = Counter(where[key] for key in own.values() if key in where)
    if not count:
        return None
    sets = ", ".join(f"{one} {number}" for one, number in count.items())
    return f"held out of the {name.rpartition('.')[2]} set: {count.total()} of {len(own)} questions ({sets})"


def _same(first: QuestionSet, second: QuestionSet) -> list[str]:
    """A warning of the same questions in a training set and another one, unless that is allowed."""
    pairs = same_questions(first.keys, second.keys)
    if not pairs or (first.name == UNLABELLED and second.name != UNLABELLED):
        return []  # unlabelled questions may also be evaluated: their answers are not trained on
    count, example = len({id_b for _, id_b in pairs}), " and ".join(pairs[0])
    if second.name == UNLABELLED:
        return [f"warning: {count} unlabelled questions are also in the labelled set, first {example}"]
    name = second.name.rpartition(".")[2]
    return [
        f"warning: {count} of {len(second.keys)} questions of {name} are also in the labelled set, with their answers, "
        f"first {example}; data.held_out=[{name}] leaves them out of training"
    ]


def near_copies(sets: Sequence[QuestionSet]) -> dict[tuple[str, str], list[Copy]]:
    """By the names of two sets, the first one's questions that are near copies of the second one's, but not the same.

    Skips questions that are also in another set unchanged. Time grows with the number of words.
    """
    held = Counter(key for questions in sets for key in set(questions.keys.values()))
    owners: list[tuple[int, str]] = []
    words: list[list[int]] = []
    for number, questions in enumerate(sets):
        for name, texts in questions.texts.items():
            own = tokens("\n".join(texts)) if held[questions.keys[name]] == 1 else []
            if len(own) >= SHINGLE + MIN_SHINGLES - 1:
                owners.append((number, name))
                words.append([crc32(word.encode("utf-8", "surrogatepass")) for word in own])
    if len({number for number, _ in owners}) < 2:
        return {}
    copies: dict[tuple[str, str], list[Copy]] = defaultdict(list)
    for one, other, shared in _alike(words, [number for number, _ in owners], COMMON * len(sets)):
        (number, first), (second_number, second) = owners[one], owners[other]
        copies[sets[number].name, sets[second_number].name].append(Copy(first, second, shared))
    return {names: sorted(pairs, key=lambda copy: -copy.shared) for names, pairs in copies.items()}


def _alike(words: list[list[int]], group: list[int], common: int) -> list[tuple[int, int, float]]:
    """The pairs (index, index, share) of word lists of different groups that share `SHARED` of their own shingles.

    `common`: a shingle in more lists than this is not counted.
    """
    import numpy as np  # only if there are questions to compare

    lengths = np.array([len(one) for one in words])
    flat = np.fromiter((word for one in words for word in one), np.uint64, int(lengths.sum()))
    owner = np.repeat(np.arange(len(words)), lengths)
    hashes = np.zeros(len(flat) - SHINGLE + 1, np.uint64)
    for place in range(SHINGLE):  # modulo 2**64
        hashes = hashes * np.uint64(0x9E3779B97F4A7C15) + flat[place : place + len(hashes)]
    whole = owner[: len(hashes)] == owner[SHINGLE - 1 :]
    hashes, owner = hashes[whole], owner[: len(hashes)][whole]
    order = np.lexsort((owner, hashes))
    hashes, owner = hashes[order], owner[order]
    new = np.ones(len(hashes), bool)  # the first occurrence of a shingle in a list
    new[1:] = (hashes[1:] != hashes[:-1]) | (owner[1:] != owner[:-1])
    hashes, owner = hashes[new], owner[new]
    _, inverse, counts = np.unique(hashes, return_inverse=True, return_counts=True)
    own = counts[inverse] <= common
    shingles, owned = hashes[own], owner[own]
    total = np.bincount(owned, minlength=len(words))
    groups = np.array(group)
    pairs = []
    for apart in range(1, common):  # entries are sorted by shingle: those of one are adjacent
        a, b = owned[:-apart], owned[apart:]
        met = (shingles[:-apart] == shingles[apart:]) & (groups[a] != groups[b])
        pairs.append(a[met] * len(words) + b[met])  # a < b
    codes, shared = np.unique(np.concatenate(pairs), return_counts=True)
    a, b = np.divmod(codes, len(words))
    fewest = np.minimum(total[a], total[b])
    near = (shared >= SHARED * fewest) & (fewest >= MIN_SHINGLES)
    shares = shared[near] / fewest[near]
    return list(zip(a[near].tolist(), b[near].tolist(), shares.tolist(), strict=True))
