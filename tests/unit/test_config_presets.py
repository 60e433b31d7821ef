"""Every preset, and every command of README.md, passes the check once the files that the user owes are there."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from megatron_tempo.cli import build
from megatron_tempo.config import Config, ConfigErrors, Problem, Purpose
from megatron_tempo.config.benchmarks import BENCHMARKS
from megatron_tempo.config.choices import Placement
from megatron_tempo.config.compose import REPOSITORY, compose_tree
from megatron_tempo.config.method_settings import Baseline, Method, Prompts, TempoSettings, ValueTiming
from megatron_tempo.config.schema import to_plain
from megatron_tempo.config.tree import MISSING, save
from megatron_tempo.config.updates import CriticTargets, Ratio
from tests.support.matrix import matrix
from tests.unit.config_files import write_model, write_rows

EXPERIMENTS = sorted(path.stem for path in (REPOSITORY / "configs" / "experiment").glob("*.yaml"))
LARGE = [name for name in EXPERIMENTS if name.startswith(("qwen3", "olmo3"))]
PAPER = [name for name in LARGE if name != "qwen3_8b_day"]
SHAPES = {
    "qwen3_8b": {"num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8},
    "qwen3_14b": {"num_hidden_layers": 40, "num_attention_heads": 40, "num_key_value_heads": 8},
    "olmo3_7b": {"num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32},
    "qwen3_30b_a3b": {
        "model_type": "qwen3_moe",
        "num_hidden_layers": 48,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
    },
}
FFN = {"qwen3_8b": 12288, "qwen3_14b": 17408, "olmo3_7b": 11008, "qwen3_30b_a3b": 6144}


def owed(experiment: str, folder: Path) -> list[str]:
    """Overrides for whatever the preset leaves to the user, with files that exist."""
    write_model(folder / "model", **shape(experiment))
    overrides = [f"experiment={experiment}", f"model={folder}/model"]
    fields = ["data.labelled", "data.unlabelled", *(f"evaluation.sets.{name}" for name in sets(experiment))]
    return overrides + [f"{field}.path={write_rows(folder / f'{i}.jsonl')}" for i, field in enumerate(fields)]


def shape(experiment: str) -> dict[str, Any]:
    name = next((name for name in SHAPES if experiment.startswith(name)), None)
    return {"intermediate_size": FFN[name], "model_type": name.partition("_")[0]} | SHAPES[name] if name else {}


def sets(experiment: str) -> list[str]:
    if experiment in ("quickstart", "logic_dates", "smollm2_arithmetic"):
        return ["unlabelled", "heldout"]
    return ["general"] if experiment.endswith("general") else ["aime2024", "aime2025"]


def test_there_are_experiments() -> None:
    assert {
        "quickstart",
        "logic_dates",
        "smollm2_arithmetic",
        "qwen3_8b_aime",
        "qwen3_14b_aime",
        "olmo3_7b_aime",
        "qwen3_8b_general",
        "qwen3_30b_a3b_aime",
    } <= set(EXPERIMENTS)


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_an_experiment_passes(experiment: str, tmp_path: Path) -> None:
    config = build(owed(experiment, tmp_path), world_size=16)
    assert config.stage1.iterations > 0
    assert config.stage2.iterations > 0
    assert config.run.dir == f"runs/{experiment}"
    assert config.stage2.method_settings.baseline is Baseline.before_token


@pytest.mark.parametrize(
    ("folder", "command"),
    [("logic-dates", "make logic-dates"), ("real-model", "python tools/real_model.py fetch")],
)
def test_a_missing_file_is_named_with_the_command_that_makes_it(folder: str, command: str) -> None:
    missing = REPOSITORY / "build" / folder / "none"
    with pytest.raises(ConfigErrors) as error:
        build(["experiment=quickstart", f"model.path={missing}", f"data.unlabelled.path={missing}.jsonl"])
    fixes = {problem.field: problem.fix for problem in error.value.problems}
    for field in ("model.path", "data.unlabelled.path"):
        assert fixes[field].endswith(f", or run `{command}`, which makes it")


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_the_reference_algorithm_goes_with_it(experiment: str, tmp_path: Path) -> None:
    overrides = owed(experiment, tmp_path)
    paper = build(overrides)
    config = build([*overrides, "algorithm=reference"])
    stage = config.stage2
    assert stage.settings == TempoSettings(
        baseline=Baseline.reference, value_timing=ValueTiming.before_estep, actor_on_labelled=True
    )
    assert stage.actor.whiten_advantages
    assert (stage.critic.targets, stage.critic.drop_uniform_groups) == (CriticTargets.plus_minus_one, True)
    assert config.run.dir == f"{paper.run.dir}_reference"
    config.stage2, config.run.dir = paper.stage2, paper.run.dir
    assert config == paper


@pytest.mark.parametrize("name", [name for name, benchmark in BENCHMARKS.items() if not benchmark.training])
def test_a_benchmark_goes_with_any_experiment(name: str, tmp_path: Path) -> None:
    path = f"evaluation.sets.{name}.path={write_rows(tmp_path / 'questions.jsonl')}"
    overrides = owed("qwen3_8b_general", tmp_path)
    config = build([*overrides, f"benchmark={name}", path])
    dataset = config.evaluation.sets.pop(name)
    assert config == build(overrides)
    assert (dataset.prompt_field, dataset.answer_field, dataset.id_field) == ("prompt", "answer", "id")
    assert (dataset.verifier, dataset.verifier_field) in [(BENCHMARKS[name].verifier, None), (None, "verifier")]
    assert dataset.suffix.startswith("\n\nReason step by step.")


ARMS = {
    "ttrl": (Method.ttrl, {Prompts.unlabelled}),
    "empo": (Method.empo, {Prompts.unlabelled}),
    "ttrl_guard": (Method.ttrl_guard, {Prompts.unlabelled}),
    "scrl": (Method.scrl, {Prompts.unlabelled}),
    "intuitor": (Method.intuitor, {Prompts.unlabelled}),
    "entropy_min": (Method.entropy_min, {Prompts.unlabelled}),
    "grpo": (Method.grpo, {Prompts.labelled}),
    "ppo": (Method.ppo, {Prompts.labelled}),
    "frozen_critic": (Method.tempo, {Prompts.unlabelled}),
    "reference": (Method.tempo, {Prompts.labelled, Prompts.unlabelled}),
    "tempo_plus": (Method.tempo, {Prompts.labelled, Prompts.unlabelled}),
    "paper": (Method.tempo, {Prompts.labelled, Prompts.unlabelled}),
}


def test_every_algorithm_is_an_arm() -> None:
    assert {path.stem for path in (REPOSITORY / "configs" / "algorithm").glob("*.yaml")} == set(ARMS)


LARGE_AND_SMALL = [(experiment, arm) for experiment in ("quickstart", "qwen3_14b_aime") for arm in ARMS]


@pytest.mark.parametrize(("experiment", "arm"), matrix(LARGE_AND_SMALL, LARGE_AND_SMALL[1::2]))
def test_an_algorithm_changes_stage_two_alone(experiment: str, arm: str, tmp_path: Path) -> None:
    overrides = owed(experiment, tmp_path)
    paper, config = build(overrides), build([*overrides, f"algorithm={arm}"])
    stage, (method, prompts) = config.stage2, ARMS[arm]
    assert stage.method is method
    assert stage.prompts() == prompts
    assert stage.trains_critic == (arm in ("ppo", "paper", "reference", "tempo_plus"))
    for kept in ("iterations", "responses_per_prompt"):
        assert getattr(stage, kept) == getattr(paper.stage2, kept)
    for kept in ("optimizer", "mini_batch_prompts", "ratio", "clip_low", "clip_high"):
        assert getattr(stage.actor, kept) == getattr(paper.stage2.actor, kept)
    assert stage.actor.entropy_coef == (0 if arm == "entropy_min" else paper.stage2.actor.entropy_coef)
    assert stage.count(prompts) == paper.stage2.count(prompts)
    assert sum(not stage.warms_up(i) for i in range(stage.iterations)) > 0
    config.stage2 = paper.stage2
    # Arms of a comparison do not share a folder: it would have the records of one under the name of the other.
    assert config.run.dir == paper.run.dir + ("" if arm == "paper" else f"_{arm}")
    config.run.dir = paper.run.dir
    assert config == paper


def test_a_given_folder_stays_an_arms_folder(tmp_path: Path) -> None:
    given = [*owed("quickstart", tmp_path), "algorithm=ttrl"]
    assert build([*given, "run.dir=mine"]).run.dir == "mine"
    assert build([*given, "+run.dir=mine/"]).run.dir == "mine/"
    whole = tmp_path / "config.json"
    save(build(["experiment=quickstart"]), whole)
    assert build(["algorithm=ttrl"], whole=str(whole)).run.dir == "runs/quickstart"


@pytest.mark.parametrize("experiment", LARGE)
def test_a_preset_of_a_published_model_says_what_it_wants(experiment: str) -> None:
    with pytest.raises(ConfigErrors) as caught:
        build([f"experiment={experiment}"])
    wanted = ["model", "data.labelled", "data.unlabelled", *(f"evaluation.sets.{name}" for name in sets(experiment))]
    assert [problem.field for problem in caught.value.problems] == [f"{name}.path" for name in wanted]
    assert {problem.value for problem in caught.value.problems} == {MISSING}


@pytest.mark.parametrize("experiment", PAPER)
def test_the_papers_recipe(experiment: str, tmp_path: Path) -> None:
    config: Config = build(owed(experiment, tmp_path))
    prompts, mini = (128, 32) if "14b" in experiment else (256, 64)
    for stage in config.stages().values():
        assert stage.labelled_prompts == prompts
        assert stage.actor.mini_batch_prompts == mini
        assert stage.responses_per_prompt == 8
        assert stage.actor.optimizer.lr == 1e-6
        assert (stage.actor.ratio, stage.actor.clip_low, stage.actor.clip_high) == (Ratio.sequence, 3e-4, 5e-4)
    assert config.stage2.unlabelled_prompts == prompts
    assert (config.rollout.max_prompt_tokens, config.rollout.max_response_tokens) == (2048, 16384)
    assert (config.rollout.temperature, config.evaluation.temperature) == (1.0, 1.0)
    assert (config.evaluation.samples, config.evaluation.pass_k) == (16, [8])


def test_quickstart_stands_on_the_repository_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = REPOSITORY / "examples" / "quickstart" / "model"
    with pytest.raises(ConfigErrors) as caught:
        build(["experiment=quickstart", f"run.dir={tmp_path}", "data.labelled.path=none.jsonl", "run.seed=-1"])
    values = {problem.field: problem.value for problem in caught.value.problems}
    assert values["data.labelled.path"] == "none.jsonl"
    assert values.get("model.path", str(model)) == str(model)


PROGRAM = r"(?:-m megatron_tempo|megatron-tempo) (train|check|eval) "


def readme_commands() -> list[str]:
    """The commands in README.md's indented blocks, continued lines joined. One of `...` alone has nothing to check."""
    text = (REPOSITORY / "README.md").read_text().replace("\\\n", " ")
    matches = re.finditer(rf"^    (.*{PROGRAM}(?!\.\.\.$).*)$", text, re.MULTILINE)
    return [match[1] for match in matches]


def test_the_readme_shows_every_command() -> None:
    assert {re.split(PROGRAM, command)[1] for command in readme_commands()} == {"train", "check", "eval"}


@pytest.mark.parametrize("command", readme_commands())
def test_a_command_of_the_readme_passes(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the files that it names. What `check` is shown to tell may only be values that are still to be given."""
    launcher, name, rest = re.split(PROGRAM, command)
    words = [word for word in shlex.split(rest, comments=True) if word != "..."]
    experiment = next((word.partition("=")[2] for word in words if word.startswith("experiment=")), "")
    monkeypatch.chdir(tmp_path)  # where relative paths lead; absolute ones are moved there
    overrides = []
    for word in words:
        key, _, value = word.partition("=")
        moved = str(tmp_path / value[1:]) if value.startswith("/") else value
        if value.endswith(".jsonl"):
            Path(moved).write_text('{"id": "1", "prompt": "1+1", "answer": "2"}\n')
        elif key in ("model", "model.path", "model.critic_path"):
            write_model(Path(moved), **shape(experiment))
        overrides.append(f"{key}={sys.executable if key == 'rollout.servers.python' else moved}")
    processes = re.search(r"--nproc-per-node (\d+)", launcher)
    purpose = Purpose.eval if name == "eval" else Purpose.train
    problems: list[Problem] = []
    try:
        build(overrides, purpose=purpose, world_size=int(processes[1]) if processes else None)
    except ConfigErrors as error:
        problems = error.problems
    assert problems == [problem for problem in problems if name == "check" and problem.value == MISSING]


SERVERS = ("devices", "replicas", "transport", "each_node")
TOGETHER = (None, 2, "shared", True)
APART = ([4, 5, 6, 7], 1, "group", True)


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
@pytest.mark.parametrize(
    ("words", "placement", "servers"),
    [
        ("", Placement.colocated, TOGETHER),
        ("cluster=h100x8", Placement.colocated, TOGETHER),
        ("cluster=h200x16", Placement.colocated, TOGETHER),
        ("cluster=h100x64", Placement.disaggregated, APART),
        ("cluster=h100x8 cluster.nodes=3", Placement.disaggregated, APART),
        ("cluster=h100x16 cluster.nodes=1", Placement.colocated, TOGETHER),
        ("rollout.placement=disaggregated", Placement.disaggregated, APART),
        ("cluster=h100x8 rollout.placement=disaggregated", Placement.disaggregated, APART),
        ("cluster=h100x8 rollout.servers.replicas=1", Placement.colocated, (None, 1, "shared", True)),
        ("cluster=h100x16 rollout.placement=disaggregated", Placement.disaggregated, APART),
        ("cluster=h100x64 rollout.placement=colocated", Placement.colocated, TOGETHER),
        ("cluster=h100x16 parallel.pipeline=2", Placement.disaggregated, APART),
        ("cluster=h100x8 parallel.pipeline=2", Placement.colocated, TOGETHER),
    ],
)
def test_servers_are_colocated_on_one_or_two_nodes_and_have_gpus_of_their_own_on_more(
    engine: str, words: str, placement: Placement, servers: tuple[object, ...]
) -> None:
    """What goes with a placement follows it, wherever it was set. A field on the command line stays."""
    given = ["experiment=qwen3_8b_aime", f"engine={engine}", *words.split()]
    tree, problems = compose_tree(given, Purpose.plan, None, None)
    rollout = tree["rollout"]
    assert problems == []
    assert (rollout["engine"], rollout["placement"]) == (engine, placement.name)
    assert tuple(rollout["servers"][name] for name in SERVERS) == servers
    assert (rollout["servers"]["tensor"], rollout["servers"]["host"]) == (4, "hostname")


@pytest.mark.parametrize(
    "words",
    [
        "engine=embedded",
        "rollout.engine=embedded",
        "rollout.engine=import:mine:Engine",
        "rollout.servers.addresses=[http://localhost:8000]",
        "cluster.rollout_nodes=1",
        *("rollout.engine=5", "rollout.engine=null", "cluster.nodes=many"),  # reported with all other problems
    ],
)
def test_what_is_not_started_on_the_trainers_nodes_is_not_colocated(words: str) -> None:
    tree, _ = compose_tree(["experiment=qwen3_8b_aime", "cluster=h100x8", words], Purpose.plan, None, None)
    assert tree["rollout"]["placement"] == "disaggregated"


@pytest.mark.parametrize("words", ["rollout.servers=5", "rollout=5", "cluster=5", "rollout.placement=[1]"])
def test_a_wrong_value_is_a_problem_of_its_own_where_a_preset_depends_on_it(words: str) -> None:
    with pytest.raises(ConfigErrors) as caught:
        build(["experiment=qwen3_8b_aime", "cluster=h100x8", words], purpose=Purpose.plan)
    assert words.partition("=")[0] in {problem.field for problem in caught.value.problems}


def test_the_presets_hold_no_field_that_equals_its_default() -> None:
    """Each default stands in a dataclass alone. An algorithm goes over an experiment, and may have to take back what
    that has set."""
    defaults = OmegaConf.create(to_plain(Config()))
    for path in sorted((REPOSITORY / "configs").glob("*/*.yaml")):
        if path.parent.name == "algorithm":
            continue
        preset: Any = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
        for field, value in leaves(preset):
            same = OmegaConf.select(defaults, field, throw_on_missing=False)
            assert same is None or same != value, f"{path.name}: {field}={value} is the default"


def leaves(node: dict, path: str = "") -> list[tuple[str, object]]:
    pairs: list[tuple[str, object]] = []
    for key, value in node.items():
        below = f"{path}.{key}" if path else str(key)
        if key == "defaults":
            continue
        pairs += leaves(value, below) if isinstance(value, dict) else [(below, value)]
    return pairs
