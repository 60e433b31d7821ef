"""tools/bench_iteration.py: its laws, tables, and what it counts in a rank."""

from __future__ import annotations

import gc
import importlib
import json
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.overrides import BaseTorchFunctionMode

from tests.support.tools import TOOLS, load_tool

DOCS = TOOLS.parent / "docs"
GRID = [(tokens, ranks) for tokens in (1e6, 4e6) for ranks in (1, 2, 4, 16)]


@pytest.fixture(autouse=True)
def tools(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(TOOLS))


def part(name: str) -> Any:
    return importlib.import_module(f"iteration_parts.{name}")


def test_a_law_is_found_from_its_own_numbers() -> None:
    law = part("laws").fit([(t, r, 2e-6 * t / r + 1e-6 * t + 0.25 * r) for t, r in GRID], least=0.01)
    assert law.factors == pytest.approx({"tokens / ranks": 2e-6, "tokens": 1e-6, "ranks": 0.25})
    assert law.error < 1e-6
    assert law.grows_with(30e6, 4096) == ["ranks"]
    assert law.grows_with(3e6, 4) == ["tokens", "tokens / ranks", "ranks"]


def test_tokens_on_every_rank_for_every_rank_are_told_from_tokens() -> None:
    law = part("laws").fit([(t, r, 12.0 * t * r) for t, r in GRID], least=1.0)
    assert law.grows_with(1e6, 64) == ["tokens x ranks"]
    assert law.at(30e6, 64) == pytest.approx(12 * 30e6 * 64)


def test_noise_does_not_become_a_term_in_ranks() -> None:
    """A cost of 1 s, measured with an error of 4%, is 1 s at 4,096 ranks."""
    noise = (-0.04, 0.03, 0.0, 0.04, -0.03, 0.01, -0.01, 0.04)
    law = part("laws").fit([(t, r, 1.0 + e) for (t, r), e in zip(GRID, noise, strict=True)], least=0.02)
    assert law.factors.keys() == {"constant"}
    assert law.at(30e6, 4096) == pytest.approx(1.0, abs=0.02)


def found(seconds: float) -> dict[str, Any]:
    """A result whose only cost is `seconds` for a million tokens on every rank."""
    points = [
        {
            "tokens": tokens,
            "rows": 8,
            "ranks": ranks,
            "held": 8 * tokens,
            "costs": {
                rank: {"packing": {"seconds": seconds * tokens / 1e6, "memory": 0, "moved": 0, "calls": 0}}
                for rank in ("first rank", "other ranks")
            },
        }
        for tokens, ranks in GRID
    ]
    whole = {"tokens": 32e6, "rows": 4096}
    return {"commit": "abc", "machine": "2 cores", "whole": whole, "not_found": [], "points": points}


def test_the_tables() -> None:
    report = part("report")
    text = report.table(found(0.5), report.laws_of(found(0.5)))
    assert "4,096 rows and 32.0 million tokens" in text
    line = next(line for line in text.splitlines() if line.startswith("packing"))
    assert line.split() == ["packing", *["16.0"] * 5, "0.5", "T"]
    page = report.page({"before": found(0.5), "after": found(0.25)})
    cells = ["16.0 \u2192 8.0"] * 5
    assert f"| packing | {' | '.join(cells)} | 0.25 T |" in page
    assert f"| sum | {' | '.join(cells)} |  |" in page


def test_the_page_shows_what_was_recorded() -> None:
    report = part("report")
    records = json.loads((DOCS / "benchmarks.json").read_text())
    assert report.page(records) in (DOCS / "benchmarks.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("word", ["4", "0:1", "4:2", "4:1/0", "x:1", "4:0", "4:1:0"])
def test_a_point_that_makes_no_sense(word: str, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    tool = load_tool("bench_iteration", monkeypatch)
    with pytest.raises(SystemExit) as ended:
        tool.main(["--points", word])
    assert ended.value.code == 2
    assert "give RANKS:PART" in capsys.readouterr().err


@pytest.fixture
def group(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """One rank, and torch's collectives as they were afterwards."""
    meter = part("meter")
    for module in (dist, dist.distributed_c10d):
        for name in meter._COLLECTIVES:
            monkeypatch.setattr(module, name, getattr(module, name))
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_a_part_has_the_time_and_the_calls_of_its_own(group: None, monkeypatch: pytest.MonkeyPatch) -> None:
    meter = part("meter")
    clock = SimpleNamespace(now=0.0)
    clock.thread_time = clock.process_time = lambda: clock.now
    clock.pthread_getcpuclockid = clock.clock_gettime = lambda _: 0.0
    monkeypatch.setattr(meter, "time", clock)
    monkeypatch.setattr(meter, "PARTS", (("broken", False, ("megatron_tempo.types:Missing.name",)),))
    measured = meter.Meter()
    measured.install()
    assert measured.missing == ["megatron_tempo.types:Missing.name"]
    clock.now = 1.0
    with measured.part("outer", True), BaseTorchFunctionMode():  # models on a CPU run below one: torch calls twice
        clock.now += 2.0
        dist.all_reduce(torch.zeros(5))
        with measured.part("inner", False):
            clock.now += 4.0
            gathered: list[Any] = [None]
            dist.all_gather_object(gathered, "x")
        clock.now += 8.0
    costs = measured.take()
    assert (costs["outer"].seconds, costs["inner"].seconds) == (10.0, 4.0)
    assert (costs["outer"].calls, costs["outer"].moved) == (1, 20)
    assert costs["inner"].calls == 2, "the sizes, and the objects"
    assert measured.take().get("outer") is None


def test_memory_is_what_a_part_needs_beyond_what_was_there() -> None:
    measured = part("meter").Meter()
    kept = torch.ones(8 << 20)
    gc.collect()  # what other tests left would be freed inside, and hide what is allocated
    with measured.part("large", True):
        torch.ones(16 << 20).sum()
    memory = measured.take()["large"].memory
    assert 0.9 * (64 << 20) < memory < 1.5 * (64 << 20), memory
    assert len(kept) == 8 << 20


def test_made_up_answers_are_what_the_adapter_reads() -> None:
    from megatron_tempo.rollout.answer_formats import sglang_answers
    from megatron_tempo.rollout.engine import Request, Sampling
    from megatron_tempo.rollout.sglang import Sglang

    made, server = part("made"), part("stub_server")
    call = Sglang(cpu=True, tensor=1).generate(Request((5, 6), 3, 0), Sampling(1.0, 400), [0])
    texts = server.Answers(mean=300.0)
    answers = sglang_answers(texts.generate(call.body))
    assert len(answers.rows) == 3
    at = 0
    for row in answers.rows:
        tokens = answers.tokens[at : at + row.tokens]
        at += row.tokens
        assert row.tokens == row.logprobs == sum(count for _, count in row.versions) <= 400
        assert row.reason == ("length" if row.tokens == 400 else "stop")
        if row.reason == "stop":
            assert tokens[-1] == made.WORDS.index(made.END)
            assert made.WORDS.index("\\boxed{") in tokens[-9:]
    assert at == len(answers.tokens)
    assert texts.generate(call.body) == texts.generate(call.body)
