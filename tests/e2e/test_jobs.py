"""The two jobs on a small project: what they leave behind, and what they refuse."""

from __future__ import annotations

import gzip
import hashlib
import json
import shutil
import unittest.mock
from dataclasses import replace
from importlib import metadata
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

from megatron_tempo.config.choices import Verifier
from megatron_tempo.config.schema import Config
from megatron_tempo.config.tree import load
from megatron_tempo.config.updates import CriticUpdateConfig, OptimizerConfig
from megatron_tempo.data.seen import seen_of
from megatron_tempo.data.sets import QuestionKeys, prompt_streams
from megatron_tempo.errors import InputError, NotFiniteError
from megatron_tempo.methods.learner import Learner
from megatron_tempo.models.packing import MicroBatch
from megatron_tempo.models.trained import Loss, Step, TrainedModel
from megatron_tempo.observability.records import read, read_evaluations, read_metrics
from megatron_tempo.report.status import status
from megatron_tempo.rewards import countdown
from megatron_tempo.rewards.verifiers import Verifiers
from megatron_tempo.training.context import open_context
from megatron_tempo.training.jobs import evaluate, train
from megatron_tempo.training.setup import build_actor, build_critic
from megatron_tempo.types import Batch
from megatron_tempo.weights.export import export_hf
from tests.support.logged import logged
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
    (output,) = run_ranks(refusal, 1, tmp_path / "longer", train, config)
    assert "stage1.iterations=2" in output
    assert "'stage1': 1, 'stage2': 1" in output
    before = {path: path.read_bytes() for path in run.glob("*.jsonl")}
    (output,) = run_ranks(refusal, 1, tmp_path / "same", train, load(run / "config.json"))
    assert output is None
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
    (output,) = run_ranks(refusal, 1, tmp_path / "again", evaluate, config)
    assert output == f"run.dir={out} belongs to another job: give a folder of its own"


def test_eval_keeps_responses_and_results(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "eval"
    config = eval_config(run.parent / "project", run / "hf_step_00000002", out)
    config.evaluation.samples, config.evaluation.pass_k = 3, [2]
    run_ranks(evaluate, 2, tmp_path / "ranks", config)
    responses = read(out / "responses.jsonl")
    assert [(r["id"], r["sample"]) for r in responses] == [(f"unlabelled:{q}", s) for q in range(8) for s in range(3)]
    results = json.loads((out / "results.json").read_text())
    result = results["sets"]["unlabelled"]
    assert result["avg"]["value"] == pytest.approx(sum(r["correct"] for r in responses) / 24)
    assert list(result["pass"]) == ["1", "2", "3"]
    assert result["pass"]["1"]["value"] == pytest.approx(result["avg"]["value"])
    assert result["response_length"]["mean"] == pytest.approx(sum(r["tokens"] for r in responses) / 24)
    assert result["truncated"] == pytest.approx(sum(r["finish"] == "length" for r in responses) / 24)
    verdicts = [countdown.score(prompt_of(run, r["id"]), r["text"], "") for r in responses]
    assert [r["correct"] for r in responses] == verdicts, "the kept text is what was judged"
    # The exported model says what it was trained on: the unlabelled questions, without their answers.
    file = run.parent / "project/unlabelled.jsonl"
    assert result["sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()
    (start,) = read(out / "starts.jsonl")
    assert (start["processes"], start["versions"]["torch"]) == (2, metadata.version("torch"))
    assert result["seen"] == read_evaluations(run)[-1]["seen"] == {"with_answers": 0, "without_answers": 8}
    assert {r["step"] for r in read(run / "seen.jsonl") if r["labels"]} == {1}
    assert read_evaluations(run)[0]["seen"] == {"with_answers": 0, "without_answers": 0}, "before training"
    assert "8 without" in (run / "report.html").read_text()


def test_an_evaluation_that_says_nothing_of_the_model_is_refused_after_it_is_written(run: Path, tmp_path: Path) -> None:
    """Responses of a countdown model by a verifier of lettered options: none can be read."""
    out = tmp_path / "eval"
    config = eval_config(run.parent / "project", run / "hf_step_00000002", out)
    config.evaluation.sets["unlabelled"].verifier = Verifier.choice
    file = tmp_path / "lettered.jsonl"
    rows = [json.loads(line) for line in (run.parent / "project/unlabelled.jsonl").read_text().splitlines()]
    file.write_text("".join(json.dumps(row | {"answer": "B"}) + "\n" for row in rows))
    config.evaluation.sets["unlabelled"].path = str(file)
    output = run_ranks(refusal, 2, tmp_path / "ranks", evaluate, config)
    assert output[0] == output[1], "every rank ends with the same error"
    assert output[0] is not None
    assert output[0].startswith("these scores do not measure the model:\n  unlabelled: none of the ")
    assert "by the verifier choice" in output[0]
    avg = json.loads((out / "results.json").read_text())["sets"]["unlabelled"]["avg"]
    assert (avg["value"], avg["low"]) == (0.0, 0.0)
    assert avg["high"] == pytest.approx(1 - 0.025 ** (1 / 8))


def test_a_resumed_run_refuses_other_evaluation_questions_and_knows_that_it_lost_its_record(
    run: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    config = load(run / "config.json")
    config.run.dir = str(copy)
    state = json.loads((copy / "checkpoints/step_00000002/run.json").read_text())
    assert state["seen"]["count"] == len(read(copy / "seen.jsonl"))
    # An answer, which training on these questions does not read, is corrected in the file.
    file = run.parent / "project/unlabelled.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    whole = file.read_bytes()
    before = {path: path.read_bytes() for path in copy.glob("*.json*")}
    try:
        file.write_text("".join(json.dumps(row | ({} if i else {"answer": "1"})) + "\n" for i, row in enumerate(rows)))
        (output,) = run_ranks(refusal, 1, tmp_path / "refused", train, config)
    finally:
        file.write_bytes(whole)
    assert output is not None
    assert "evaluation.sets.unlabelled: the file, its fields, the tokenizer or the chat template changed" in output
    assert {p: p.read_bytes() for p in copy.glob("*.json*") if p.name != "heartbeat.json"} == {
        path: content for path, content in before.items() if path.name != "heartbeat.json"
    }
    (copy / "seen.jsonl").unlink()
    shutil.rmtree(copy / "hf_step_00000002")
    (output,) = run_ranks(refusal, 1, tmp_path / "lost", train, config)
    assert output is None
    assert "which questions the model was trained on is unknown" in (tmp_path / "lost/rank0.log").read_text()
    assert seen_of(copy / "hf_step_00000002/actor", ["any"]) is None


def prompt_of(run: Path, name: str) -> str:
    rows = (run.parent / "project/unlabelled.jsonl").read_text().splitlines()
    prompt: str = json.loads(rows[int(name.partition(":")[2])])["prompt"]
    return prompt


def first_questions(config: Config) -> tuple[list[str], list[str]]:
    """The ids that would be trained on, and what is logged about them."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(config.model.path)
    with Verifiers() as verifiers, logged() as output:
        streams = prompt_streams(config, tokenizer, verifiers, QuestionKeys.read(config))
    return [prompt.id for stream in streams if stream is not None for prompt in stream.first(99)], output


def test_held_out_questions_are_not_trained_on(tmp_path: Path) -> None:
    project = write_project(tmp_path / "project")
    rows = [json.loads(line) for line in (project / "unlabelled.jsonl").read_text().splitlines()]
    labelled = [json.loads(line) for line in (project / "labelled.jsonl").read_text().splitlines()]
    (project / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*rows[:3], labelled[5]]))
    config = config_of(project, tmp_path / "run")
    config.evaluation.sets["test"] = replace(config.evaluation.sets["unlabelled"], path=str(project / "test.jsonl"))
    everything, output = first_questions(config)
    assert len(everything) == 16
    assert output == [
        "warning: 1 of 4 questions of test are also in the labelled set, with their answers, "
        "first labelled:5 and test:3; "
        "data.held_out=[test] leaves them out of training"
    ]
    config.data.held_out = ["test"]
    kept, output = first_questions(config)
    assert set(everything) - set(kept) == {"labelled:5", "unlabelled:0", "unlabelled:1", "unlabelled:2"}
    assert output == [
        "held out of the labelled set: 1 of 8 questions (test 1)",
        "held out of the unlabelled set: 3 of 8 questions (test 3)",
    ]
    config.data.held_out = ["unlabelled"]
    with pytest.raises(InputError, match=r"leaves no question of data\.unlabelled"):
        first_questions(config)


def export_with_shorter_critic(project: Path, critic: Path, out: Path) -> None:
    config = config_of(project, out / "run")
    config.model.path, config.model.critic_path = str(project / "model"), str(critic)
    with open_context(config) as context:
        export_hf(context.config, build_actor(context), build_critic(context), out)


def test_a_critic_of_another_shape_is_exported_as_it_is(tmp_path: Path) -> None:
    project = write_project(tmp_path / "project", "tied")
    critic = write_model(tmp_path / "critic", tied=False, layers=2, seed=3)
    run_ranks(export_with_shorter_critic, 1, tmp_path / "ranks", project, critic, tmp_path / "out")
    layers = [
        transformers.AutoModelForTokenClassification.from_pretrained(tmp_path / "out/critic").config.num_hidden_layers,
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out/actor").config.num_hidden_layers,
    ]
    assert layers == [2, 4]


def updated(model: Path, out: Path, wrong: list[str]) -> tuple[dict[str, float], list[torch.Tensor], str]:
    """Figures, weights and error of a critic's update by mini-batches of which the first ones are wrong, as `wrong`
    says, and the last is not."""
    config = Config()
    config.model.path, config.run.dir = str(model), str(out)
    batch, order = ragged_batch(8), torch.arange(8).split(2)
    targets = batch.correct.clone()
    for name, rows in zip(wrong, order, strict=False):
        if name == "loss":
            targets[rows[0]] = torch.nan  # a row that one of two ranks has
    with open_context(config) as context:
        critic = build_critic(context)
        step, count = TrainedModel.step, 0

        def steep(
            self: TrainedModel,
            batch: Batch,
            rows: torch.Tensor,
            owners: torch.Tensor,
            loss: Loss,
            metrics: int,
            config: OptimizerConfig,
        ) -> Step:
            """The step by a loss that is as it was, but whose gradient is infinite, where that is to be."""
            nonlocal count
            count += 1
            kind = wrong[count - 1] if count <= len(wrong) else ""

            def changed(micro: MicroBatch, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
                by_row, metrics = loss(micro, values)
                return by_row + (values.mean() - values.mean().detach()).sqrt(), metrics

            return step(self, batch, rows, owners, changed if kind == "gradient" else loss, metrics, config)

        metrics, error = {}, ""
        try:
            with unittest.mock.patch.object(TrainedModel, "step", steep):
                metrics = critic.update(batch, targets, CriticUpdateConfig(), [*order[: len(wrong)], order[-1]])
        except NotFiniteError as caught:
            error = str(caught)
        with critic.model.at_work():  # which waits for the weights that the other replica sends
            return metrics, [parameter.detach().clone() for parameter in critic.model.net.parameters()], error


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "model", tied=False)


@pytest.mark.parametrize("wrong", [["loss"], ["gradient", "loss"]])
def test_what_is_not_finite_is_skipped_and_the_next_step_trains(tmp_path: Path, model: Path, wrong: list[str]) -> None:
    two = run_ranks(updated, 2, tmp_path / "ranks", model, tmp_path / "run", wrong)
    expected = run_ranks(updated, 2, tmp_path / "alone", model, tmp_path / "none", [])
    start = run_ranks(weights_at_the_start, 1, tmp_path / "start", model)[0]
    for (metrics, weights, error), (alone, untouched, _) in zip(two, expected, strict=True):
        assert not all(torch.equal(a, b) for a, b in zip(weights, start, strict=True))
        assert error == ""
        assert metrics["critic/skipped"] == len(wrong)
        assert metrics["critic/loss"] == alone["critic/loss"]  # of the good mini-batch alone
        # As if the skipped ones had never been: neither weights nor Adam's moments know of them.
        assert all(torch.equal(a, b) for a, b in zip(weights, untouched, strict=True))
    names = [f"step_00000000_critic_{number + 1}.safetensors" for number in range(len(wrong))]
    assert sorted(path.name for path in (tmp_path / "run/skipped").iterdir()) == names
    assert not (tmp_path / "none").exists()
    seen, batch = load_file(tmp_path / "run/skipped" / names[-1]), ragged_batch(8)
    rows = seen["rows"].tolist()
    assert rows == [2 * len(wrong) - 2, 2 * len(wrong) - 1]
    assert seen["targets"].isnan().tolist() == [True, False]
    assert seen["losses"].isnan().tolist() == [True, False]
    assert seen["response_tokens"].tolist() == [t for row in rows for t in batch.responses()[row].tolist()]
    assert seen["prompt_tokens"].tolist() == [t for row in rows for t in batch.prompts()[row].tolist()]


def weights_at_the_start(model: Path) -> list[torch.Tensor]:
    config = Config()
    config.model.path = str(model)
    with open_context(config) as context:
        return [parameter.detach().clone() for parameter in build_critic(context).model.net.parameters()]


def test_too_many_in_a_row_stop_the_run_with_the_weights_as_they_were(tmp_path: Path, model: Path) -> None:
    stopped = run_ranks(updated, 2, tmp_path / "ranks", model, tmp_path / "run", ["loss"] * 3)
    start = run_ranks(weights_at_the_start, 1, tmp_path / "start", model)[0]
    for metrics, weights, error in stopped:
        assert metrics == {}
        assert "the critic's loss or gradient was not finite at 3 optimizer steps in a row" in error
        assert Path(error.split("mini-batch is in ")[1].split(";")[0]).exists()
        assert all(torch.equal(a, b) for a, b in zip(weights, start, strict=True))


def poisoned(config: Config) -> None:
    """Train with an advantage that is not a number in the first update of the actor."""
    count = 0

    def values(*arguments: object) -> torch.Tensor:
        nonlocal count
        count += 1
        values = final_values(*arguments)  # type: ignore[arg-type]
        if count == 1:
            values[0] = torch.nan
        return values

    final_values = Learner.final_values
    with unittest.mock.patch.object(Learner, "final_values", values):
        train(config)


@pytest.fixture(scope="module")
def mended(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two processes and two iterations, the second of them traced."""
    out = tmp_path_factory.mktemp("mended")
    config = config_of(write_project(out / "project"), out / "run")
    config.stage2.iterations, config.evaluation.sets = 2, {}
    config.evaluation.calibration_set, config.checkpoint.export_hf = None, False
    config.profile.steps = [2]
    run_ranks(poisoned, 2, out / "ranks", config)
    return out / "run"


def test_a_run_tells_of_a_skipped_step_and_goes_on(mended: Path) -> None:
    first, second = read_metrics(mended)
    assert [line["actor/skipped"] for line in (first, second)] == [1.0, 0.0]
    assert [line["critic/skipped"] for line in (first, second)] == [0.0, 0.0]
    assert first["actor/loss"] is not None
    (path,) = (mended / "skipped").iterdir()
    seen = load_file(path)
    assert path.name.startswith("step_00000001_actor_")
    assert seen["advantages"].isnan().sum() == seen["response_lengths"][seen["rows"] == 0].sum() > 0
    assert seen["old_logprobs"].shape == seen["advantages"].shape == seen["engine_logprobs"].shape
    log = (mended.parent / "ranks/rank0.log").read_text()
    assert log.count("alert: steps are skipped, step 1: 1 of the actor's steps were not finite") == 1
    output = status(mended)
    assert output.well
    assert "finished at" in output.text
    assert "alerts      steps are skipped, step 1 (over)" in output.text


def test_a_trace_of_each_rank_names_the_phases(mended: Path) -> None:
    names = sorted(path.relative_to(mended / "profile").as_posix() for path in (mended / "profile").rglob("*.json.gz"))
    assert names == ["step_2/rank_0.json.gz", "step_2/rank_1.json.gz"]
    for path in names:
        events = json.loads(gzip.decompress((mended / "profile" / path).read_bytes()))["traceEvents"]
        lasts = {event["name"]: event["dur"] for event in events if event.get("cat") == "user_annotation"}
        assert {"generate", "values", "critic", "logprobs", "actor", "sync"} <= lasts.keys()
        # The same seconds as in metrics.jsonl, of the rank that wrote them: a trace's are microseconds.
        seconds = read_metrics(mended)[1]["time/critic"]
        assert lasts["critic"] / 1e6 == pytest.approx(seconds, rel=0.5)
        assert any(event.get("name") == "aten::mm" for event in events)


def test_the_exported_run_differs_from_its_start(run: Path) -> None:
    start = {name: tensor for bucket in tensors(run.parent / "project/model") for name, tensor in bucket}
    end = {name: tensor for bucket in tensors(run / "hf_step_00000002/actor") for name, tensor in bucket}
    assert not any(torch.equal(start[name], end[name]) for name in start if "weight" in name)
