"""A run with all kinds of extensions: those of examples/extensions."""

from __future__ import annotations

import csv
import json
import shutil
import sys
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

from megatron_tempo.config import check
from megatron_tempo.config.choices import Verifier
from megatron_tempo.config.extensions import Extension
from megatron_tempo.config.schema import Config
from megatron_tempo.config.stages import ExtensionSettings
from megatron_tempo.observability.records import (
    read_evaluations,
    read_metrics,
    read_samples,
    read_starts,
    read_warnings,
)
from megatron_tempo.training.jobs import train
from tests.support.project import ROOT, config_of, write_project
from tests.support.ranks import run_ranks

NAMES = {
    "data.labelled.verifier": "import:countdown_verifier:verifier",
    "data.labelled.reader": "import:csv_reader:read",
    "stage2.method": "import:leave_one_out:method",
    "rollout.engine": "import:generate_engine:GenerateEngine",
    "evaluation.sets.asked.chat_template": "import:zero_template:template",
}


def train_with_examples(config: Config) -> None:
    """As with examples/extensions on PYTHONPATH."""
    sys.path.insert(0, str(ROOT / "examples/extensions"))
    assert not (problems := check(config, world_size=2)), problems
    train(config)


def knows_all_words(model: Path) -> None:
    """Give the quickstart's tokenizer a token for unknown words: the template writes some."""
    given = model.resolve()
    model.unlink()
    shutil.copytree(given, model)
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    tokenizer["model"]["unk_token"] = "<pad>"
    (model / "tokenizer.json").write_text(json.dumps(tokenizer))


def config_for(project: Path, out: Path) -> Config:
    knows_all_words(project / "model")
    config = config_of(project, out)
    rows = [json.loads(line) for line in (project / "labelled.jsonl").read_text().splitlines()]
    with (project / "labelled.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    assert config.data.labelled is not None
    config.data.labelled = replace(
        config.data.labelled,
        path=str(project / "labelled.csv"),
        reader=Extension.parse(NAMES["data.labelled.reader"]),
        verifier=Extension.parse(NAMES["data.labelled.verifier"]),
    )
    config.data.unlabelled = None
    config.stage2.settings = ExtensionSettings(Extension.parse(NAMES["stage2.method"]), {"advantage_limit": 0.25})
    config.stage2.unlabelled_prompts = 0
    config.evaluation.calibration_set = None
    template = Extension.parse(NAMES["evaluation.sets.asked.chat_template"])
    (asked,) = config.evaluation.sets.values()
    # The countdown verifiers read the question, which is not alone in the prompt here.
    asked = replace(asked, chat_template=template, system="Solve it.", verifier=Verifier.text)
    config.evaluation.sets, config.rollout.max_prompt_tokens = {"asked": asked}, 40
    config.rollout.engine = Extension.parse(NAMES["rollout.engine"])
    config.rollout.dump = True
    return config


def test_a_run_with_extensions_resumes(tmp_path: Path) -> None:
    project, out = write_project(tmp_path / "project"), tmp_path / "run"
    config = config_for(project, out)
    run_ranks(train_with_examples, 2, tmp_path / "ranks", config)
    (line,) = read_metrics(out)
    assert line["method"] == NAMES["stage2.method"]
    assert line["actor/grad_norm"] > 0
    assert 0 < line["rloo/advantage_max"] <= 0.25, "the method's own setting"
    responses = [json.loads(text) for text in (out / "rollouts/stage2-000001.jsonl").read_text().splitlines()]
    assert any(0 < response["correct"] < 1 for response in responses), "graded verdicts"
    assert [path.name for path in (out / "hf_step_00000001").iterdir()] == ["actor"], "the method needs no critic"
    assert line["engine/logprob_gap_mean"] < 1e-4, "the engine's log-probabilities are the trainer's"
    assert [evaluation["set"] for evaluation in read_evaluations(out)] == ["asked"] * 2
    assert all(sample["prompt"].startswith("Solve it.\nUser: ") for sample in read_samples(out))
    recorded = json.loads((out / "config.json").read_text())
    assert recorded["data"]["labelled"]["verifier"] == NAMES["data.labelled.verifier"]
    assert recorded["data"]["labelled"]["reader"] == NAMES["data.labelled.reader"]
    assert recorded["stage2"]["method"] == NAMES["stage2.method"]
    assert recorded["stage2"]["advantage_limit"] == 0.25
    assert recorded["rollout"]["engine"] == NAMES["rollout.engine"]
    assert recorded["evaluation"]["sets"]["asked"]["chat_template"] == NAMES["evaluation.sets.asked.chat_template"]
    (start,) = read_starts(out)
    assert start["extensions"] == {
        name: sha256((ROOT / "examples/extensions" / f"{Extension.parse(name).module}.py").read_bytes()).hexdigest()
        for name in NAMES.values()
    }
    # As if the verifier had been another one at the first start.
    start["extensions"][NAMES["data.labelled.verifier"]] = "0" * 64
    (out / "starts.jsonl").write_text(json.dumps(start) + "\n")
    config.stage2.iterations = 2
    run_ranks(train_with_examples, 2, tmp_path / "again", config)
    assert [line["step"] for line in read_metrics(out)] == [1, 2]
    changed = [warning["text"] for warning in read_warnings(out) if "its module changed" in warning["text"]]
    assert [text.split(": its")[0] for text in changed] == [NAMES["data.labelled.verifier"]]
