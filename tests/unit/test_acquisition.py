"""Which questions to label: the corrective advantage gap by hand, its expectation, and the tool that chooses."""

from __future__ import annotations

import json
import math
from itertools import product
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import scipy.optimize
import torch

from megatron_tempo.algorithm.acquisition import (
    advantage_gaps,
    class_features,
    class_probabilities,
    expected_gaps,
    fit_logistic,
    gap_of_counts,
    to_label,
)
from megatron_tempo.errors import InputError
from tests.support.tools import load_tool


def test_the_gap_by_hand() -> None:
    """Four of eight agree, two others are right. The majority's advantages are 1 and -1. Those of the label have the
    mean 1/4 and the standard deviation sqrt(3)/4, so they are sqrt(3) and -1/sqrt(3). The differences are
    1 + 1/sqrt(3) four times, -1 - sqrt(3) twice and -1 + 1/sqrt(3) twice. The sum of their squares is
    4 (4/3 + 2/sqrt(3)) + 2 (4 + 2 sqrt(3)) + 2 (4/3 - 2/sqrt(3)) = 16 + 16/sqrt(3)."""
    pseudo = torch.tensor([[1, 1, 1, 1, 0, 0, 0, 0]] * 3)
    verified = torch.tensor([[0, 0, 0, 0, 1, 1, 0, 0], [0] * 8, [1, 1, 1, 1, 0, 0, 0, 0]])
    wanted = [math.sqrt(16 + 16 / math.sqrt(3)), math.sqrt(8), 0.0]  # two right, none, and the majority is right
    assert advantage_gaps(pseudo, verified).tolist() == pytest.approx(wanted)


def test_the_gap_depends_on_counts_alone() -> None:
    for x, y in product(range(9), range(9)):
        if x + y <= 8:
            pseudo = torch.tensor([[1.0] * x + [0.0] * (8 - x)])
            verified = torch.tensor([[0.0] * x + [1.0] * y + [0.0] * (8 - x - y)])
            by_counts = gap_of_counts(8, torch.tensor([x]), torch.tensor([y]))
            assert float(by_counts) == pytest.approx(float(advantage_gaps(pseudo, verified)), abs=1e-9), (x, y)


def test_the_expected_gap_by_hand() -> None:
    """Four of eight have the majority's answer (right with 1/2), two another (1/4), one a third (1/8); one has none.

    With 1/8 none is right. CAG(8, 4, 2)^2 = 16 + 16/sqrt(3), CAG(8, 4, 1)^2 = 16 (1 + sqrt(1/7)), CAG(8, 4, 0)^2 = 8.
    """
    classes = torch.tensor([[0, 1, 1, 0, 2, 0, 0, -1], [0] * 8, [-1] * 8])
    right = torch.tensor([[1 / 2, 1 / 4, 1 / 8], [0.9, 0, 0], [0, 0, 0]])
    expected, majority = expected_gaps(classes, right)
    two, one = math.sqrt(16 + 16 / math.sqrt(3)), math.sqrt(16 * (1 + math.sqrt(1 / 7)))
    wanted = two / 4 + one / 8 + math.sqrt(8) / 8
    assert expected.tolist() == pytest.approx([wanted, 0.0, 0.0]), "where all agree there is nothing to correct"
    assert majority.tolist() == pytest.approx([0.5, 0.9, 0.0])


def test_the_gate_leaves_out_the_most_reliable() -> None:
    scores, right = torch.tensor([5.0, 4.0, 3.0, 3.0, 1.0]), torch.tensor([0.9, 0.1, 0.2, 0.3, 0.4])
    assert to_label(scores, right, 2, 0.0).tolist() == [0, 1]
    assert to_label(scores, right, 2, 0.2).tolist() == [1, 2], "the earlier one of equal scores"
    assert to_label(scores, right, 5, 0.2).tolist() == [0, 1, 2, 3, 4], "if the others are too few"
    assert to_label(scores, right, 1, 0.6).tolist() == [1], "two of five would be left"


def test_features_by_hand() -> None:
    """Two of four responses have class 0 (10 and 20 tokens), one class 1 (40), one no answer (10): the mean is 20."""
    features = class_features(torch.tensor([[0, 0, 1, -1]]), torch.tensor([[10, 20, 40, 10]]))
    assert features.tolist() == [[[0.5, 1.0, 0.75, 0.75], [0.25, 0.0, 0.75, 2.0]]]


def test_the_regression_is_at_its_minimum() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 3, generator=generator, dtype=torch.float64)
    likely = (x @ torch.tensor([2.0, -1.0, 0.5]).double() - 1).sigmoid()
    labels = (torch.rand(200, generator=generator) < likely).double()

    def loss(weights: Any) -> float:
        logits = x @ torch.tensor(weights[:-1]) + weights[-1]
        losses = torch.nn.functional.binary_cross_entropy_with_logits(logits, labels, reduction="sum")
        return float(losses) + 0.5 * float((weights**2).sum())

    wanted = scipy.optimize.minimize(loss, [0.0] * 4, tol=1e-10).x
    assert fit_logistic(x, labels).tolist() == pytest.approx(wanted.tolist(), abs=1e-4)


def test_the_probabilities_of_a_question_sum_to_one_at_most() -> None:
    features = torch.tensor([[[3.0], [3.0], [3.0]], [[-3.0], [-3.0], [3.0]]]).double()
    counts = torch.tensor([[2, 1, 1], [3, 1, 0]])
    right = class_probabilities(features, counts, torch.tensor([1.0, 0.0]).double())
    low = 1 / (1 + math.exp(3))
    assert right.flatten().tolist() == pytest.approx([1 / 3, 1 / 3, 1 / 3, low, low, 0.0])


# The tool


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return load_tool("acquire", monkeypatch)


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


# Answers of the policy, and which of them is right: the majority of a and b is wrong, that of c is right; all d agree.
ANSWERS = {"a": "1 1 2 2 1 3", "b": "1 1 1 1 1 2", "c": "1 1 1 1 2 3", "d": "1 1 1 1 1 1", "e": "1 2 3 4 5 6"}
RIGHT = {"a": "2", "b": "2", "c": "1", "d": "9", "e": "9"}


@pytest.fixture
def files(tmp_path: Path) -> tuple[str, str]:
    pool = write(tmp_path / "pool.jsonl", [{"id": name, "prompt": f"Question {name}?"} for name in ANSWERS])
    responses = [
        {"set": "pool", "id": name, "sample": i, "text": f"The answer is \\boxed{{{word}}}.", "tokens": 10 + i,
         "correct": int(word == RIGHT[name])}
        for name, words in ANSWERS.items() for i, word in enumerate(words.split())
    ]  # fmt: skip
    return str(write(tmp_path / "responses.jsonl", responses)), str(pool)


def chosen(tool: ModuleType, files: tuple[str, str], *words: str) -> list[str]:
    out = Path(files[1]).with_name("chosen.jsonl")
    out.unlink(missing_ok=True)
    tool.main([*files, "--out", str(out), *words])
    return [row["id"] for row in map(json.loads, out.read_text().splitlines())]


def test_the_tool_chooses_by_each_rule(
    tool: ModuleType, files: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    text_words = ["--verifier", "text", "--budget", "2", "--rule"]
    # The greatest gaps: b's 5 of 6 wrong against one right, then a's 3 against 2. e's majority is its first answer.
    assert chosen(tool, files, *text_words, "oracle") == ["a", "b"]
    assert "2 of 5 questions, by oracle" in capsys.readouterr().out
    assert chosen(tool, files, *text_words, "entropy") == ["a", "e"]
    assert len(chosen(tool, files, *text_words, "random")) == 2
    # By shares the majority of d, b and c is most likely right; the gate of 2/5 leaves out d and b.
    assert chosen(tool, files, "--verifier", "text", "--budget", "3", "--gate", "0.4") == ["a", "c", "e"]


def test_the_tool_reads_the_verdicts_of_known_questions_alone(tool: ModuleType, files: tuple[str, str]) -> None:
    known = write(Path(files[1]).with_name("known.jsonl"), [{"id": "a"}, {"id": "c"}])
    words = ["--verifier", "text", "--budget", "2", "--known", str(known)]
    first = chosen(tool, files, *words)
    assert not {"a", "c"} & set(first)
    responses = [json.loads(line) for line in Path(files[0]).read_text().splitlines()]
    changed = [row | {"correct": 1 - row["correct"]} if row["id"] not in "ac" else row for row in responses]
    write(Path(files[0]), changed)
    assert chosen(tool, files, *words) == first


def test_the_tool_reads_rollouts(tool: ModuleType, files: tuple[str, str]) -> None:
    """Of a method that compares answers: with classes, and without verdicts."""
    lines = [
        {"prompt_id": name, "response": "", "response_tokens": [1] * 9, "correct": None, "answer_class": int(word) - 1}
        for name, words in ANSWERS.items() for word in words.split()
    ]  # fmt: skip
    rollouts = str(write(Path(files[0]).with_name("stage2-000001.jsonl"), lines)), files[1]
    assert chosen(tool, rollouts, "--budget", "3", "--gate", "0.4") == ["a", "c", "e"]
    with pytest.raises(InputError, match="--rule=oracle needs verdicts"):
        chosen(tool, rollouts, "--budget", "1", "--rule", "oracle")
    known = write(Path(files[1]).with_name("known.jsonl"), [{"id": "a"}])
    with pytest.raises(InputError, match="--known needs verdicts"):
        chosen(tool, rollouts, "--budget", "1", "--known", str(known))


def test_the_tool_refuses_what_it_cannot_use(tool: ModuleType, files: tuple[str, str]) -> None:
    text_words = ["--verifier", "text"]
    with pytest.raises(InputError, match="5 questions have no label; give 1 to 5"):
        chosen(tool, files, *text_words, "--budget", "6")
    with pytest.raises(InputError, match="every question of the pool has a label"):
        chosen(tool, files, *text_words, "--budget", "1", "--known", files[1])
    other = write(Path(files[1]).with_name("other.jsonl"), [{"id": "z"}])
    with pytest.raises(InputError, match="has none of the pool's questions"):
        chosen(tool, files, *text_words, "--budget", "1", "--known", str(other))
    with pytest.raises(InputError, match=r"no response to a question of .*other\.jsonl: .* id_field=id"):
        tool.main([files[0], str(other), "--budget", "1", *text_words, "--out", files[1] + ".new"])
    with pytest.raises(InputError, match=r"--verifier=math\|countdown"):
        chosen(tool, files, "--budget", "1")
    with pytest.raises(InputError, match="exists; give another --out"):
        tool.main([*files, "--budget", "1", *text_words, "--out", files[1]])
    with pytest.raises(InputError, match="not a share"):
        chosen(tool, files, *text_words, "--budget", "1", "--gate", "1")
    lines = Path(files[0]).read_text().splitlines()
    Path(files[0]).write_text("\n".join(lines[:-1]))
    with pytest.raises(InputError, match=r"has 5 responses to 'e' of .*, and up to 6 to others"):
        chosen(tool, files, *text_words, "--budget", "1")
    Path(files[0]).write_text("\n".join([*lines, "[]"]))
    with pytest.raises(InputError, match="line 31 is not an object with 'id', a text or a whole number"):
        chosen(tool, files, *text_words, "--budget", "1")


SPOILED: dict[str, tuple[dict[str, Any], str]] = {
    "a class that is text": ({"answer_class": "1"}, "'answer_class' is '1', not the number of a class"),
    "a class between two": ({"answer_class": 0.5}, "'answer_class' is 0.5, not the number of a class"),
    "a verdict in words": ({"correct": "yes"}, "'correct' is 'yes', not a verdict from 0 to 1"),
    "a verdict above 1": ({"correct": 2}, "'correct' is 2, not a verdict from 0 to 1"),
    "tokens in words": ({"tokens": "ten"}, "'tokens' or 'response_tokens' is 'ten', not a number of tokens"),
    "no text": ({"text": None}, "'text' or 'response' is None, not a text"),
}


@pytest.mark.parametrize("name", SPOILED)
def test_a_bad_response_is_named(tool: ModuleType, files: tuple[str, str], name: str) -> None:
    spoiled, wrong = SPOILED[name]
    rows = [json.loads(line) for line in Path(files[0]).read_text().splitlines()]
    if "answer_class" in spoiled:
        rows = [row | {"answer_class": 0} for row in rows]
    rows[3] |= spoiled
    write(Path(files[0]), rows)
    with pytest.raises(InputError) as caught:
        chosen(tool, files, "--verifier", "text", "--budget", "1")
    assert f"{files[0]}, line 4: {wrong}" in str(caught.value)


def test_the_pool_is_read_as_a_run_reads_it(tool: ModuleType, files: tuple[str, str]) -> None:
    """Whole numbers as ids, blank lines, a byte-order mark, Unicode's line separators. Rows are written as they are."""
    numbers = {name: i for i, name in enumerate(ANSWERS)}
    rows = [f'{{"id": {i},  "prompt": "Question\u2028 {name}?\u0085"}}' for name, i in numbers.items()]
    Path(files[1]).write_text("\ufeff" + "\n\n".join(rows) + "\n\n", encoding="utf-8")
    responses = [json.loads(line) for line in Path(files[0]).read_text().splitlines()]
    write(Path(files[0]), [row | {"id": str(numbers[row["id"]])} for row in responses])
    out = Path(files[1]).with_name("chosen.jsonl")
    tool.main([*files, "--out", str(out), "--verifier", "text", "--budget", "2", "--rule", "oracle"])
    assert out.read_text(encoding="utf-8") == f"{rows[0]}\n{rows[1]}\n"


def test_the_tool_tells_questions_of_two_sets_apart(tool: ModuleType, files: tuple[str, str]) -> None:
    text = Path(files[0]).read_text()
    other = text.replace('"set": "pool"', '"set": "other"').replace('"correct": 1', '"correct": 0')
    Path(files[0]).write_text(other + text)
    words = ("--verifier", "text", "--budget", "2", "--rule", "oracle")
    with pytest.raises(InputError, match=r"responses of 2 sets, each with ids of its own: --set=other\|pool"):
        chosen(tool, files, *words)
    assert chosen(tool, files, *words, "--set", "pool") == ["a", "b"]
    with pytest.raises(InputError, match=r"--set=no: .* has other, pool"):
        chosen(tool, files, *words, "--set", "no")


def test_the_tool_refuses_places_and_ids_that_it_cannot_use(tool: ModuleType, files: tuple[str, str]) -> None:
    words = (*files, "--verifier", "text", "--budget", "1", "--out")
    with pytest.raises(InputError, match=r"there is no folder .*; make it first"):
        tool.main([*words, f"{files[1]}.d/chosen.jsonl"])
    link = Path(f"{files[1]}.link")
    link.symlink_to("nothing")
    with pytest.raises(InputError, match="exists; give another --out"):
        tool.main([*words, str(link)])
    with pytest.raises(InputError, match="not a number from 0"):
        tool.main([*words, f"{files[1]}.new", "--seed", str(10**23)])
    pool = Path(files[1])
    pool.write_text(pool.read_text() + '{"id": "a", "prompt": "Again?"}\n')
    with pytest.raises(InputError, match=r"line 6 has the id 'a', as has .*pool\.jsonl, line 1; keep one"):
        tool.main([*words, f"{files[1]}.new"])


def test_the_gate_is_the_share_that_was_given() -> None:
    """0.07 * 100 is above 7 in floating point."""
    right = torch.linspace(0, 1, 100, dtype=torch.float64)
    for gate, n in ((0.07, 100), (0.14, 50), (0.28, 25), (0.25, 8)):
        kept = to_label(torch.ones(n), right[:n], n - round(gate * n), gate)
        assert kept.tolist() == list(range(n - round(gate * n)))
