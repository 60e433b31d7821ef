"""A run with a judge: when the judge goes down the run is saved, and it goes on asking nothing twice."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megatron_tempo.config.choices import Verifier
from megatron_tempo.config.schema import Config
from megatron_tempo.errors import EngineError
from megatron_tempo.observability.records import read, read_metrics
from megatron_tempo.rewards import countdown
from megatron_tempo.training.jobs import evaluate, train
from tests.support.judge import Judge, Reply, judge_server, quoted, verdict
from tests.support.project import config_of, write_project
from tests.support.ranks import run_ranks


def by_rule(judge: Judge, body: dict[str, Any]) -> Reply:
    parts = quoted(body)
    right = countdown.score(parts["QUESTION"], f"{parts['RESPONSE']} $", "")  # a judge gets no end tokens
    return verdict(parts["nonce"], "right" if right else "wrong")


def asked(judge: Judge) -> list[str]:
    return [json.dumps({k: v for k, v in quoted(body).items() if k != "nonce"}) for body in judge.asked]


def attempt(job: Any, config: Config) -> str | None:
    try:
        job(config)
    except EngineError as error:
        return str(error)
    return None


def test_a_judge_that_goes_down_and_comes_back(tmp_path: Path) -> None:
    project, out = write_project(tmp_path / "project"), tmp_path / "run"
    config = config_of(project, out)
    assert config.data.labelled is not None
    config.data.labelled.verifier = Verifier.judge
    config.stage2.iterations = 2
    config.evaluation.every = 0

    def until_the_first_iteration_is_done(judge: Judge, body: dict[str, Any]) -> Reply:
        return Reply("", 503) if read_metrics(out) else by_rule(judge, body)

    with judge_server(until_the_first_iteration_is_done) as judge:
        config.rewards.judge.url, config.rewards.judge.model, config.rewards.judge.retries = judge.url, "m", 0
        output = run_ranks(attempt, 2, tmp_path / "first", train, config)
        assert output[0] is not None
        assert f"the judge m at {judge.url} gave no answer in 1 tries" in output[0]
        assert output[0].endswith(f"rerun the same command to resume from {out}/checkpoints/step_00000001")
        assert output[1] == output[0], "on every rank, so that all could save"
        (line,) = read_metrics(out)
        known = set(asked(judge)[: line["judge/asked"]])
        judge.asked.clear()
        judge.answer = by_rule
        assert run_ranks(attempt, 2, tmp_path / "second", train, config) == [None, None]
        assert not known & set(asked(judge)), "verdicts of the first start are not asked for again"
        last = read_metrics(out)[-1]
        assert last["step"] == 2
        assert last["judge/asked"] + last["judge/cached"] >= 8 * 4
        judge.asked.clear()
        judged_eval(config, judge, tmp_path)


def judged_eval(config: Config, judge: Judge, tmp_path: Path) -> None:
    """An evaluation by the judge and by the rule say the same."""
    for name, verifier in (("judge", Verifier.judge), ("rule", Verifier.countdown)):
        config.run.dir = str(tmp_path / name)
        config.evaluation.sets["unlabelled"].verifier = verifier
        run_ranks(evaluate, 1, tmp_path / f"{name}_ranks", config)
    verdicts = [[r["correct"] for r in read(tmp_path / name / "responses.jsonl")] for name in ("judge", "rule")]
    assert verdicts[0] == verdicts[1]
    assert 0 < sum(verdicts[0]) < len(verdicts[0])
    result = json.loads((tmp_path / "judge/results.json").read_text())["sets"]["unlabelled"]
    assert result["verifiers"] == ["judge"]
    assert result["judge/asked"] == len(judge.asked)
    assert result["judge/asked"] + result["judge/cached"] == len(verdicts[0])
