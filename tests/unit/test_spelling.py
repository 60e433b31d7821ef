"""Spellings of mathematics and the marks around a number: what is taken off, and that hostile text costs little."""

from __future__ import annotations

import time

import pytest

from megatron_tempo.rewards.endings import THOUGHTS, begun_thought, behind_thoughts, without_end
from megatron_tempo.rewards.math import ANSWER_CHARS
from megatron_tempo.rewards.spelling import latex, narrow
from megatron_tempo.rewards.units import Marks, agree, split


@pytest.mark.parametrize(
    ("written", "spelled"),
    [
        ("x² + 4√2", r"x^{2} + 4\sqrt{2}"),
        ("√(2+x)", r"\sqrt{2+x}"),
        ("sqrt(3)/2", r"\sqrt{3}/2"),
        (r"\dfrac \pi 6", r"\frac{\pi}{6}"),
        (r"\frac{\frac12}3", r"\frac{\frac{1}{2}}{3}"),
        ("1½", r"1\frac{1}{2}"),
        ("1 1/2", r"1\frac{1}{2}"),
        (r"7,\!221", "7221"),
        ("1,234", "1234"),
        ("(1,234)", "(1,234)"),
        ("1,2,3", "1,2,3"),
        ("1 234", "1234"),
        ("5 6", "5 6"),
        ("x_1^2", "x_{1}^{2}"),
        (r"\log_2 8", r"\log_{2} 8"),
        ("1.5e3", r"1.5\times 10^{3}"),
        (r"\begin{pmatrix}1 \\ 2\end{pmatrix}", r"\begin{pmatrix}1 \\ 2\end{pmatrix}"),
        ("①③", r"\textcircled{1}\textcircled{3}"),
        (r"5\,\text{m}", r"5 \text{m}"),
        ("＝７", "7"),
    ],
)
def test_spelling(written: str, spelled: str) -> None:
    assert latex(written) == spelled
    assert latex(spelled) == spelled, "it is one spelling"


@pytest.mark.parametrize(
    ("written", "core", "marks"),
    [
        (r"30\%", "30", Marks(percent=True)),
        ("60°", "60", Marks(degrees=True)),
        (r"12\text{ cm}^2", "12", Marks(unit="cm^2")),
        ("12 square centimetres", "12", Marks(unit="cm^2")),
        ("5 miles per hour", "5", Marks(unit="mi/h")),
        (r"3\text{ m}/\text{s}^2", "3", Marks(unit="m/s^2")),
        ("14 weeks", "14", Marks(unit="week")),
        ("€14.", "14", Marks(unit="euro")),
        (r"-\$5", "-5", Marks(unit="dollar")),
        ("3 million dollars", "3", Marks(unit="dollar", scale=6)),
        ("1001_2", "1001", Marks(base=2)),
        ("5 units", "5", Marks()),
        ("5m", "5m", Marks()),
        ("5 or more", "5 or more", Marks()),
        (r"4\text{ or }5", r"4\text{ or }5", Marks()),
        (r"x = \text{east}", r"x = \text{east}", Marks()),
        ("1, 2, ...", r"1, 2, ...", Marks()),
        ("102_2", "102_{2}", Marks()),
        (r"20^\circ C", "20", Marks(unit="degree c")),
    ],
)
def test_marks_are_taken_off(written: str, core: str, marks: Marks) -> None:
    assert split(latex(written)) == (core, marks)


def test_units_agree() -> None:
    assert agree("", "cm")
    assert agree("wool sweater", "sweater")
    assert not agree("cm", "m")
    assert not agree("cm", "cm^2")


def test_full_width_text_is_narrow_and_unseen_characters_are_gone() -> None:
    assert narrow("答案：（Ｂ）\u200b") == "答案:(B)"
    assert narrow("𝟏𝟗 𝐱") == "19 x"


ENDS = ["<|im_end|>", "</s>", "<｜end▁of▁sentence｜>", "<eos><pad>", "[EOS]", "<END_OF_TURN>"]


@pytest.mark.parametrize("end", ENDS)
def test_end_tokens_of_all_families(end: str) -> None:
    assert without_end(f"1/2{end} \n") == "1/2"
    assert without_end(f"{end}1/2") == f"{end}1/2"
    assert without_end("a < b > c [d]") == "a < b > c [d]"


@pytest.mark.parametrize(("begin", "end"), THOUGHTS)
def test_thoughts_of_all_families(begin: str, end: str) -> None:
    assert behind_thoughts(f"{begin}4{end}5") == "5"
    assert behind_thoughts(f"4{end}5") == "5", "the prompt began it"
    assert behind_thoughts(f"{begin}4") == ""
    assert behind_thoughts(f"{begin}4", read_unfinished=True) == f"{begin}4"
    assert begun_thought(f"<bot>{begin}\n") == begin
    assert begun_thought("<bot>") == ""


HOSTILE = [
    "\\frac", "\\sqrt(", "√", "a ", "1 ", "1,", "\\text{a}", "{", "\\frac{", "/ ", "x_", "^", "2^", "\\text{a}/", "(",
    "$",
    "1/2 ", "½", "e3 ", "\\,", "and ", "=", ".", "\\circ^", "10\\%,", "¼²", "\\text{", "5 a/", "Rs",
]  # fmt: skip


@pytest.mark.parametrize("piece", HOSTILE)
def test_a_hostile_answer_costs_little(piece: str) -> None:
    started = time.process_time()
    for behind in ("", "!", "1"):
        split(latex(piece * (ANSWER_CHARS // len(piece)) + behind))
    assert time.process_time() - started < 2


@pytest.mark.parametrize("piece", ["<think>", "</think>", "<|", "<|im_end|>", "<answer>", "１"])
def test_a_hostile_response_costs_little(piece: str) -> None:
    started = time.process_time()
    narrow(without_end(behind_thoughts(piece * 100_000)))
    assert time.process_time() - started < 2
