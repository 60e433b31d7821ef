"""The two jobs on a small project: what they leave behind, and what they refuse."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers

from megatron_tempo.config.schema import Config, OptimizerConfig
from megatron_tempo.config.tree import load
from megatron_tempo.errors import InputError
from megatron_tempo.models.packing import MicroBatch
from megatron_tempo.records import read, read_evaluations
from megatron_tempo.rewards import countdown
from megatron_tempo.rewards.verifiers import Verifiers
from megatron_tempo.train import evaluate, train
from megatron_tempo.wiring import QuestionKeys, build_actor, build_critic, export_hf, open_workplace, prompt_streams
from tests.support.project import config_of, from_nothing, write_project
from tests.support.ranks import run_ranks
from tests.support.tiny import ragged_batch, write_model
from tests.support.weights import tensors


def refusal(job: object, config: Config) -> str | None:
    try:
        job(config)  # type: ignore[operator]
    except InputError as error:
        return str(error)
    return None


def eval_config(project: Path, model: Path, out: Path) -> Config:
    config = config_of(project, out)
    config.model.path, config.model.critic_path = str(model / "actor"), str(model / "critic")
    return config


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of one iteration in each stage, with the published code's targets."""
    out = tmp_path_factory.mktemp("jobs")
    config = from_nothing(config_of(write_project(out / "project"), out / "run"))
    config.stage1.iterations = 1
    config.metrics.report = True
    run_ranks(train, 1, out / "ranks", config)
    return out / "run"


def test_other_stage_lengths_are_refused_and_the_same_only_print(run: Path, tmp_path: Path) -> None:
    config = load(run / "config.json")
    config.stage1.iterations = 2
    (told,) = run_ranks(refusal, 1, tmp_path / "longer", train, config)
    assert "stage1.iterations=2" in told
    assert "'stage1': 1, 'stage2': 1" in told
    before = {path: path.read_bytes() for path in run.glob("*.jsonl")}
    (told,) = run_ranks(refusal, 1, tmp_path / "same", train, load(run / "config.json"))
    assert told is None
    assert {path: path.read_bytes() for path in run.glob("*.jsonl")} == before
    assert (run / "report.html").stat().st_size > 0


def test_eval_of_an_exported_run_agrees_with_the_run(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "eval"
    config = eval_config(run.parent / "project", run / "hf_step_00000002", out)
    run_ranks(evaluate, 1, tmp_path / "ranks", config)
    (alone,) = read_evaluations(out)
    trained = read_evaluations(run)[-1]
    assert trained["point"] == "after"
    assert alone["avg"] == trained["avg"]
    # The critic's targets are +-1, which its exported config says: read as 0 and 1 this would differ.
    assert alone["calibration"]["last"]["ece"] == pytest.approx(trained["calibration"]["last"]["ece"], abs=1e-6)
    (told,) = run_ranks(refusal, 1, tmp_path / "again", evaluate, config)
    assert told == f"run.dir={out} belongs to another job: give a folder of its own"


def test_eval_keeps_responses_and_results(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "eval"
    config = eval_config(run.parent / "project", run / "hf_step_00000002", out)
    config.evaluation.samples, config.evaluation.pass_k = 3, [2]
    run_ranks(evaluate, 2, tmp_path / "ranks", config)
    responses = read(out / "responses.jsonl")
    assert [(r["id"], r["sample"]) for r in responses] == [(f"unlabelled:{q}", s) for q in range(8) for s in range(3)]
    results = json.loads((out / "results.json").read_text())
    found = results["sets"]["unlabelled"]
    assert found["avg"]["value"] == pytest.approx(sum(r["correct"] for r in responses) / 24)
    assert list(found["pass"]) == ["1", "2", "3"]
    assert found["pass"]["1"]["value"] == pytest.approx(found["avg"]["value"])
    assert found["response_length"]["mean"] == pytest.approx(sum(r["tokens"] for r in responses) / 24)
    assert found["truncated"] == pytest.approx(sum(r["finish"] == "length" for r in responses) / 24)
    verdicts = [countdown.score(prompt_of(run, r["id"]), r["text"], "") for r in responses]
    assert [r["correct"] for r in responses] == verdicts, "the kept text is what was judged"
    # The exported model says what it was trained on: the unlabelled questions, without their answers.
    assert found["seen"] == read_evaluations(run)[-1]["seen"] == {"with_answers": 0, "without_answers": 8}
    assert {r["step"] for r in read(run / "seen.jsonl") if r["labels"]} == {1}
    assert read_evaluations(run)[0]["seen"] == {"with_answers": 0, "without_answers": 0}, "before training"
    assert "8 without" in (run / "report.html").read_text()


def prompt_of(run: Path, name: str) -> str:
    rows = (run.parent / "project/unlabelled.jsonl").read_text().splitlines()
    prompt: str = json.loads(rows[int(name.partition(":")[2])])["prompt"]
    return prompt


def first_questions(config: Config) -> tuple[list[str], list[str]]:
    """The ids that would be trained on, and what is told about them."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(config.model.path)
    told: list[str] = []
    with Verifiers() as verifiers:
        streams = prompt_streams(config, tokenizer, verifiers, QuestionKeys.read(config), told.append)
    return [prompt.id for stream in streams if stream is not None for prompt in stream.first(99)], told


def test_held_out_questions_are_not_trained_on(tmp_path: Path) -> None:
    project = write_project(tmp_path / "project")
    rows = [json.loads(line) for line in (project / "unlabelled.jsonl").read_text().splitlines()]
    labelled = [json.loads(line) for line in (project / "labelled.jsonl").read_text().splitlines()]
    (project / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*rows[:3], labelled[5]]))
    config = config_of(project, tmp_path / "run")
    config.evaluation.sets["test"] = replace(config.evaluation.sets["unlabelled"], path=str(project / "test.jsonl"))
    everything, told = first_questions(config)
    assert len(everything) == 16
    assert told == []
    config.data.held_out = ["test"]
    kept, told = first_questions(config)
    assert set(everything) - set(kept) == {"labelled:5", "unlabelled:0", "unlabelled:1", "unlabelled:2"}
    assert told == [
        "held out of the labelled set: 1 of 8 questions (test 1)",
        "held out of the unlabelled set: 3 of 8 questions (test 3)",
    ]
    config.data.held_out = ["unlabelled"]
    with pytest.raises(InputError, match=r"leaves no question of data\.unlabelled"):
        first_questions(config)


def export_with_shorter_critic(project: Path, critic: Path, out: Path) -> None:
    config = config_of(project, out / "run")
    config.model.path, config.model.critic_path = str(project / "model"), str(critic)
    with open_workplace(config) as place:
        export_hf(place, build_actor(place), build_critic(place), out)


def test_a_critic_of_another_shape_is_exported_as_it_is(tmp_path: Path) -> None:
    project = write_project(tmp_path / "project", "tied")
    critic = write_model(tmp_path / "critic", tied=False, layers=2, seed=3)
    run_ranks(export_with_shorter_critic, 1, tmp_path / "ranks", project, critic, tmp_path / "out")
    layers = [
        transformers.AutoModelForTokenClassification.from_pretrained(tmp_path / "out/critic").config.num_hidden_layers,
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out/actor").config.num_hidden_layers,
    ]
    assert layers == [2, 4]


def step_on_nan(model: Path) -> tuple[str, bool]:
    """What a step with a NaN in its loss says, and whether the weights are as before."""
    config = Config()
    config.model.path = str(model)
    with open_workplace(config) as place:
        trained = build_critic(place).model
        before = [parameter.clone() for parameter in trained.net.parameters()]

        def loss(micro: MicroBatch, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            by_row = values.sum() * torch.full((len(micro.rows),), torch.nan)
            return by_row, by_row.detach()[:, None]

        batch = ragged_batch(4)
        try:
            trained.step(batch, torch.arange(4), loss, 1, OptimizerConfig(lr=1.0))
        except FloatingPointError as error:
            same = all(torch.equal(a, b) for a, b in zip(before, trained.net.parameters(), strict=True))
            return str(error), same
    return "no error", False


def test_a_gradient_that_is_not_finite_leaves_the_weights(tmp_path: Path) -> None:
    ((told, same),) = run_ranks(step_on_nan, 1, tmp_path / "ranks", write_model(tmp_path / "model", tied=False))
    assert told == "the gradient's norm is nan at optimizer step 1"
    assert same


def test_the_exported_run_differs_from_its_start(run: Path) -> None:
    start = {name: tensor for bucket in tensors(run.parent / "project/model") for name, tensor in bucket}
    end = {name: tensor for bucket in tensors(run / "hf_step_00000002/actor") for name, tensor in bucket}
    assert not any(torch.equal(start[name], end[name]) for name in start if "weight" in name)
