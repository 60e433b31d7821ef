"""Every fix that a problem of the configuration offers is tried: the problem is then gone.

The problems are those of the other tests of the rules and some more, so that each place in the sources that makes one
is reached.
"""

from __future__ import annotations

import ast
import json
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser

from megatron_tempo.config import Config, Problem, Purpose, check
from megatron_tempo.config.cluster import ClusterConfig
from megatron_tempo.config.compose import REPOSITORY
from megatron_tempo.config.rules import rewards as reward_rules
from megatron_tempo.config.schema import to_plain
from megatron_tempo.config.tree import read
from megatron_tempo.plan.split import problems as plan_problems
from megatron_tempo.submit import job as jobs
from tests.support.fixes import offers
from tests.unit import test_config_rules as rules
from tests.unit import test_precision_rules as precision
from tests.unit.config_files import MOE, good_overrides, write_all, write_model

pytestmark = pytest.mark.long  # all together: hundreds of configurations are composed and checked

Site = tuple[str, int]
CLUSTER = [
    *("memory_gb=80", "bf16_tflops=989", "memory_tbs=3.35", "nvlink_gbs=450", "network_gbs=50", "nodes=2", "gpu=H100"),
]
CLUSTER = [f"cluster.{word}" for word in CLUSTER]
SERVED = ["rollout.engine=vllm", "rollout.servers.python=sh"]
COLOCATED = ["rollout.placement=colocated", "rollout.servers.transport=shared"]
SHARED = ["rollout.servers.transport=shared", "rollout.servers.each_node=true", "rollout.servers.host=hostname"]
AWAY = [*CLUSTER, *SERVED, "rollout.servers.host=hostname", "cluster.rollout_nodes=1"]
KEY = "rollout.servers.key_file=TMP/key"
GIVEN = [*SERVED, KEY, "rollout.servers.addresses=[http://127.0.0.1:1]"]
MIXTURE = ["model.path=TMP/mixture"]
APART = "rollout.servers.arguments=[--enable-expert-parallel]"
JUDGE = ["rewards.judge.url=http://h:1/v1", "rewards.judge.model=m"]

# Configurations with problems that the other files do not have. `launched` stands for torchrun's number of processes,
# `purpose` for the command.
MORE = [
    ["launched=2", "parallel.world_size=4"],
    ["purpose=eval", "~evaluation.sets.heldout"],
    ["purpose=eval", "evaluation.sets.heldout.prompt_field=promt"],
    ["purpose=eval", "run.dir=TMP/evaluated"],
    # tree
    ["stage1=ppo"],
    ["evaluation.sets=5"],
    ["evaluation.pass_k=8"],
    ["run.seed=two"],
    ["run.dir=7"],
    ["run.device=gpu"],
    ["run.resume='???'"],
    ["evaluation.sets=[a]"],
    ["run.sed=1"],
    ["run.max_skipped=4"],
    ["rolout.dump=true"],
    ["stage2.method='import:no'"],
    ["evaluation.sets.held.path=TMP/heldout.jsonl", "evaluation.sets.held.answer=b"],
    ['run.dir="a\\u001bb"'],
    ['run.dir="a\\udce9"'],
    ['evaluation.sets={"a\\u001bb": {path: a.jsonl}}'],
    ["cluster.slurm.time_limit=43200"],
    ["cluster.slurm.time_limit=30"],
    ["cluster.slurm.account=83"],
    # numbers
    ["stage1.labelled_prompts=1000000007"],
    ["rollout.servers.devices=[-1]", *SERVED],
    ["run.seed=" + "9" * 309],
    ["rollout.temperature=" + "9" * 309],
    # servers and judges
    [*SERVED, "rollout.servers.python=TMP/none"],
    [*SERVED, "rollout.servers.devices=[0,1]"],
    [*SERVED, "rollout.servers.devices=[0,1]", "rollout.servers.replicas=3"],
    [*SERVED, "rollout.servers.devices=[0]"],
    [*CLUSTER, *SERVED, "launched=16"],
    [*CLUSTER, *SERVED, "parallel.world_size=16"],
    [*SERVED, "rollout.servers.key_file=TMP/key"],
    [*SERVED, "rollout.servers.host='::1'"],
    [*SERVED, "rollout.servers.host=0.0.0.0"],
    [*SERVED, "rollout.servers.host='a b'"],
    [*SERVED, KEY, "rollout.servers.addresses=[http://127.0.0.1]"],
    [*SERVED, KEY, "rollout.servers.addresses=[]"],
    [*SERVED, KEY, "rollout.servers.addresses=[http://10.0.0.5:1]"],
    [*GIVEN, "rollout.servers.key_file=null"],
    [*GIVEN, "rollout.servers.key_file=/none"],
    [*GIVEN, "rollout.servers.each_node=true"],
    [*CLUSTER, *SERVED, *SHARED, "parallel.pipeline=2", "parallel.virtual_pipeline=2"],
    [*CLUSTER, *SERVED, *SHARED, "parallel.tensor=2", "launched=2"],
    [*CLUSTER, *SERVED, *SHARED, "parallel.tensor=2", "launched=2", "rollout.placement=colocated"],
    [*SERVED, "rollout.servers.transport=shared", "rollout.servers.precision=fp8"],
    ["rollout.partial_rollouts=true"],
    ["rollout.max_staleness=1"],
    ["rollout.stale_groups=drop"],
    ["rollout.stop=null"],
    ["rollout.seed=" + "9" * 30],
    ["stage2.refill_limit=4000"],
    ["stage1.refill_limit=4000", "rollout.replay=TMP"],
    ["stage1.actor.correction.high=2"],
    ["stage1.actor.correction.low=0.5"],
    ["stage1.actor.correction.out_of_bounds=mask"],
    ["stage1.length_penalty=0.5"],
    ["stage1.refill_limit=4000", "stage1.responses_per_prompt=1"],
    ["stage1.actor.correction={level: token, low: 2, high: 1}"],
    ["stage1.actor.correction={level: sequence, out_of_bounds: mask, high: 0.5}"],
    ["stage1.actor.importance_cap=2"],
    ["stage1.actor.importance_cap=null"],
    [*SERVED, "rollout.max_staleness=1", "rollout.replay=TMP"],
    ["rollout.placement=colocated"],
    [*SERVED, "rollout.placement=colocated"],
    [*CLUSTER, *SERVED, *SHARED, "rollout.placement=colocated", "parallel.pipeline=2"],
    [*SERVED, *COLOCATED, "rollout.servers.precision=fp8"],
    [*GIVEN, *COLOCATED],
    [*CLUSTER, *SERVED, *COLOCATED, "cluster.rollout_nodes=1"],
    [*CLUSTER, "cluster.nodes=1", *SERVED, *COLOCATED, "rollout.servers.replicas=9"],
    [*CLUSTER, "cluster.nodes=1", *SERVED, *COLOCATED, "rollout.servers.devices=[9]"],
    [*SERVED, "run.hang_minutes=1"],
    [*SERVED, "model.path=TMP/moe", "run.device=cpu"],
    [*SERVED, "model.path=TMP/moe", "rollout.servers.arguments=['--no-enable-prefix-caching']"],
    [*SERVED, "model.path=TMP/moe", "rollout.servers.arguments=['--pipeline-parallel-size=2']"],
    ["evaluation.sets.heldout.verifier=judge"],
    ["rewards.judge.url=h:1", JUDGE[1]],
    ["rewards.judge.url=http://h:99999/v1", JUDGE[1]],
    ["rewards.judge.url=http://h:1/v1/chat/completions", JUDGE[1]],
    [*JUDGE, "rewards.judge.key_file=/none"],
    [*JUDGE, *rules.TTRL, "data.unlabelled.verifier=judge"],
    [*rules.TTRL, "data.unlabelled.verifier=code"],
    ["rewards.code.sandbox=bubblewrap"],
    # the run
    ["profile.steps=[0]"],
    ["profile.steps=[1,9]"],
    ["run.dir=TMP/made", "run.resume=false"],
    ["run.dir=TMP/broken/run"],
    ["run.dir=TMP/records"],
    ["run.dir=TMP/closed"],
    ["run.dir=/proc/none/run"],
    [f"run.dir=TMP/{'a' * 300}"],
    ["run.dir=TMP/loop/run"],
    # models, data, stages
    ["model.path=TMP/loop"],
    ["model.path=TMP/plain"],
    ["model.path=TMP/other"],
    ["model.path=TMP/untemplated"],
    ["model.path=TMP/unindexed"],
    ["model.path=TMP/sharded"],
    ["model.path=TMP/empty"],
    ["model.critic_path=TMP/wide"],
    ["model.critic_path='???'"],
    ["data.labelled.path=TMP/loop.jsonl"],
    [f"data.labelled.path=TMP/{'a' * 300}.jsonl"],
    ["data.labelled.path=TMP/folder.jsonl"],
    ["evaluation.sets.heldout.verifier='import:no_such_package.a:b'"],
    ["stage2.method='import:no_such_package.a:b'"],
    ["stage1.method=tempo", "stage1.unlabelled_prompts=256", "stage1.estep_every=0"],
    ["stage1.method=grpo", "stage2.estep_every=0"],
    ["rollout.max_prompt_tokens=40000", "rollout.max_response_tokens=40000"],
    [*rules.EMPO, "stage2.entropy_low=2", "stage2.entropy_high=1"],
    [*rules.SCRL, "stage2.negative_share=0.5"],
    [*rules.SCRL, "stage2.vote_responses=null"],
    ["parallel.world_size=3", "stage1.responses_per_prompt=7"],
    ["parallel.world_size=3", "parallel.tensor=2"],
    # mixtures of experts
    [*MIXTURE, "parallel.expert=3"],
    [*MIXTURE, "parallel.critic.expert=3"],
    [*MIXTURE, "parallel.expert_tensor=5"],
    [*MIXTURE, "parallel.expert=4", "launched=2"],
    [*MIXTURE, "parallel.expert=8", "parallel.critic.expert=1", "launched=4"],
    [*MIXTURE, "parallel.expert_tensor=4", "launched=2"],
    [*MIXTURE, "parallel.tensor=2", "parallel.expert=2", "parallel.pipeline=2", "parallel.sequence=true", "launched=4"],
    [*MIXTURE, "parallel.tensor=2"],
    [*MIXTURE, "parallel.critic.tensor=2"],
    ["parallel.expert=2"],
    ["parallel.critic.expert=2", "model.critic_path=TMP/critic"],
    ["parallel.expert_tensor=2"],
    [*MIXTURE, "model.critic_path=TMP/critic", "parallel.expert=2", "parallel.expert_tensor=2"],
    ["model.router_aux_loss_coef=0.01"],
    [*MIXTURE, *SERVED, "model.router_replay='off'", "rollout.servers.tensor=3"],
    [*MIXTURE, *SERVED, "model.router_replay='off'", "rollout.servers.precision=fp8", "rollout.servers.tensor=2"],
    [*MIXTURE, *SERVED, "model.router_replay='off'", "rollout.servers.tensor=16", APART],
    [*MIXTURE, *SERVED, "model.router_replay='off'", "rollout.servers.arguments=[--enable-eplb]"],
    [
        *MIXTURE,
        *SERVED,
        "rollout.engine=sglang",
        "rollout.servers.tensor=4",
        "rollout.servers.arguments=['--ep-size=3']",
    ],
    [*SERVED, APART],
    [*MIXTURE, "run.precision=fp8_blockwise"],
    # the cluster
    [*AWAY, "cluster.rollout_nodes=2"],
    [*CLUSTER, "cluster.rollout_nodes=1"],
    [*AWAY, "rollout.servers.addresses=[http://10.0.0.5:1]", KEY],
    [*AWAY, "rollout.servers.replicas=9"],
    [*AWAY, "rollout.servers.tensor=16"],
    [*AWAY, "rollout.servers.each_node=true"],
    [*AWAY, "rollout.servers.transport=shared"],
    [*AWAY, "rollout.servers.host=localhost"],
    [*AWAY, *COLOCATED],
    [*CLUSTER, "cluster.slurm.time_limit=12h"],
    [*CLUSTER, "cluster.slurm.options=[qos]"],
    [*CLUSTER, "cluster.slurm.environment={A-B: c}"],
    [*CLUSTER, "cluster.slurm.mounts=[/a:/b]"],
    [*CLUSTER, "cluster.slurm.container=i", "cluster.slurm.mounts=[a]"],
    [*CLUSTER, "run.dir='TMP/a:b'"],
    [*CLUSTER, "run.dir='TMP/a,b'", "cluster.slurm.container=i"],
    [*CLUSTER, "parallel.world_size=15"],
    [*CLUSTER, "parallel.world_size=32"],
    [*CLUSTER, "cluster.memory_gb=0"],
    [*CLUSTER, *SERVED, "rollout.servers.devices=[9]"],
    [*CLUSTER, "cluster.nodes=3"],
    ["cluster=null"],
    [*CLUSTER, "model.path='???'"],
    [*CLUSTER, "model.path=TMP/empty"],
    [*CLUSTER, "model.path=TMP/plain"],
    ["model.path=TMP/export"],
    ["model.critic_path=TMP/export"],
]
CASES = [
    *([row[0]] for row in rules.ONE_FIELD),
    *(row[1] for row in rules.SEVERAL_FIELDS),
    *([*row[0], *row[1].split()] for row in rules.GROUPS),
    *(["model.path=TMP/even", *row[0].split()] for row in precision.BROKEN),
    *MORE,
]
# What is done about a fix in prose, by a part of it: overrides, or None where it is done outside the configuration.
BY_HAND: dict[str, list[str] | None] = {
    "give another run.dir": ["run.dir=TMP/elsewhere"],
    "give a run.dir": ["run.dir=TMP/elsewhere"],
    "give a folder of its own": ["run.dir=TMP/elsewhere"],
    "chown or move what an earlier job left there": ["run.dir=TMP/elsewhere"],
    "as transformers' save_pretrained writes it": ["model.path=TMP/model", "model.critic_path=TMP/critic"],
    "give a folder with the config.json of a model": ["model.path=TMP/model"],
    "give a model of the family": ["model.path=TMP/model"],
    "copy the tokenizer's files there": ["model.path=TMP/model"],
    "copy them there too": ["model.path=TMP/model"],
    "data=FILE, or evaluation.sets.NAME.path=FILE": ["evaluation.sets.heldout.path=TMP/heldout.jsonl"],
    "give a critic of the same tokenizer": ["model.critic_path=TMP/critic"],
    "write it again, or bring back a whole copy": ["model.path=TMP/model"],
    "give one JSONL or Parquet file": ["data.labelled.path=TMP/labelled.jsonl"],
    "give an existing file": [
        "data.labelled.path=TMP/labelled.jsonl",
        "evaluation.sets.heldout.path=TMP/heldout.jsonl",
    ],
    "convert it to JSONL": ["data.unlabelled.path=TMP/unlabelled.jsonl"],
    "give two files without common questions": ["data.unlabelled.path=TMP/unlabelled.jsonl"],
    "set its fields, such as stage1.method": ["~stage1", "stage1.method=ppo"],
    "set evaluation.sets.NAME fields": ["~evaluation.sets", "evaluation.sets.heldout.path=TMP/heldout.jsonl"],
    "rename evaluation.sets.": ["~evaluation.sets"],
    "name it with letters, digits and _ only": ["~evaluation.sets.a-b"],
    "type run.dir anew": ["run.dir=TMP/run"],
    "give run.dir in UTF-8": ["run.dir=TMP/run"],
    "give http": ["rollout.servers.addresses=[http://127.0.0.1:1]"],
    "give it as http://HOST:PORT/v1": ["rewards.judge.url=http://h:1/v1"],
    "give it as http://HOST:PORT": ["rollout.servers.addresses=[http://127.0.0.1:1]"],
    "give each server's address once": ["rollout.servers.addresses=[http://127.0.0.1:1]"],
    "give the file that the servers have their key from": [KEY],
    "give the file with the key": [KEY, "rewards.judge.key_file=TMP/key"],
    "write it as --NAME=VALUE": ["cluster.slurm.options=['--qos=high']"],
    "letters, digits and _ only": ["cluster.slurm.environment={A_B: c}"],
    "write it as /HOST/FOLDER": ["cluster.slurm.mounts=['/a:/b']"],
    "a file of configs/cluster or of --config-dir": CLUSTER,
    "cluster=h100x8, or cluster.FIELD": CLUSTER,
    "put the folder that holds no_such_package on PYTHONPATH": None,
    "pip install": None,
}
# Places that make a problem of what a user's machine or a user's code is; they are tried in other tests.
OUTSIDE = {
    "config/rules/precision.py": {"check_machine", "_gpu", "_attention"},
    "config/rules/extensions.py": {"_verifier", "_graded"},
    "config/rules/evaluation.py": {"_trackers"},
    "config/rules/rollout.py": {"check_serve", "_ahead"},
    "config/rules/sampling.py": {"_imported"},
    "config/tree.py": {"read_settings"},
    "config/compose.py": {
        *(
            "compose_tree",
            "_whole",
            "_check_whole",
            "_sift",
            "_refused",
            "set_names_of",
            "attributed",
            "_check_presets",
        ),
    },
}
FILES = ["config/tree.py", "plan/split.py", "plan/shapes.py", "submit/job.py", "config/compose.py"]
FILES += [f"config/rules/{path.name}" for path in (REPOSITORY / "megatron_tempo/config/rules").glob("*.py")]


@dataclass(frozen=True, slots=True)
class Recorded:
    problem: Problem
    site: Site  # file and line that made it

    @property
    def is_of(self) -> tuple[str, Site]:
        return self.problem.field, self.site


class Recorder:
    """Notes where each problem is made."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.made: list[Recorded] = []
        original = Problem.__init__

        def init(problem: Problem, *words: Any, **named: Any) -> None:
            original(problem, *words, **named)
            frame = sys._getframe(1)
            file = os.path.relpath(frame.f_code.co_filename, REPOSITORY / "megatron_tempo")
            self.made.append(Recorded(problem, (file, frame.f_lineno)))

        monkeypatch.setattr(Problem, "__init__", init)

    def of(self, plain: dict[str, Any]) -> list[Recorded]:
        """The problems of a tree: those of `check`, and on a cluster those of `submit` and `plan` too."""
        self.made = []
        launched, purpose = plain.pop("launched", None), Purpose[plain.pop("purpose", "train")]
        config, problems = read(plain)
        problems += check(config, world_size=launched, purpose=purpose)
        if "cluster" in plain:
            problems += [*jobs.problems(config, jobs.Kind.train), *plan_problems(config)]
        return [one_made for one_made in self.made if any(one_made.problem is one for one in problems)]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fixes")
    write_all(folder)
    write_model(folder / "even", **precision.EVEN)
    write_model(
        folder / "mixture", model_type="qwen3_moe", num_experts=8, num_experts_per_tok=2, moe_intermediate_size=64
    )
    write_model(folder / "wide", vocab_size=101)
    write_model(folder / "other", model_type="mistral")
    write_model(folder / "moe", **MOE)
    (write_model(folder / "plain") / "tokenizer_config.json").write_text("{}")
    (folder / "plain/tokenizer.json").unlink()
    (folder / "plain/config.json").write_text("{")
    (write_model(folder / "untemplated") / "tokenizer_config.json").write_text("{}")
    write_model(folder / "export/actor")
    write_model(folder / "export/critic")
    (write_model(folder / "unindexed") / "model.safetensors.index.json").write_text("{}")
    rules.shard(write_model(folder / "sharded"))
    (folder / "empty").mkdir()
    (folder / "key").write_text("secret\n")
    (folder / "folder.jsonl").mkdir()
    (folder / "made/checkpoints/step_00000020").mkdir(parents=True)
    (folder / "records/metrics.jsonl").mkdir(parents=True)
    (folder / "closed").mkdir()
    (folder / "evaluated").mkdir()
    (folder / "evaluated/config.json").write_text("{}")
    (folder / "closed/checkpoints").write_text("a file")
    (folder / "run/rollouts").mkdir(parents=True)
    (folder / "broken").symlink_to(folder / "nowhere")
    for name in ("loop", "loop.jsonl"):
        (folder / name).symlink_to(folder / name)
    return folder


@pytest.fixture(autouse=True)
def without_bubblewrap(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reward_rules, "has_bubblewrap", lambda: False)


@cache
def default(cluster: bool) -> str:
    plain = to_plain(Config(cluster=ClusterConfig() if cluster else None))
    return json.dumps(plain if cluster else {name: group for name, group in plain.items() if name != "cluster"})


def put(plain: dict[str, Any], key: str, value: Any) -> None:
    *groups, name = key.split(".")
    for group in groups:
        if not isinstance(plain.get(group), dict):
            plain[group] = {}
        plain = plain[group]
    is_group = isinstance(value, dict) and isinstance(plain.get(name), dict)
    plain[name] = plain[name] | value if is_group else value


def tree(files: Path, given: Sequence[str], offered: Sequence[str] = ()) -> dict[str, Any]:
    """The tree as plain data. What is given is YAML, as in a preset; what is offered is read by Hydra's grammar."""
    words = [word.replace("TMP", str(files)) for word in (*good_overrides(files), *given)]
    removed = tuple(word[1:] for word in (*given, *offered) if word.startswith("~"))
    words = [word for word in words if not removed or not word.startswith(removed)]
    plain: dict[str, Any] = json.loads(default(any(word.startswith("cluster.") for word in (*words, *offered))))
    for word in words:
        key, _, value = word.partition("=")
        if not word.startswith("~"):
            put(plain, key, yaml.safe_load(value))
    for word in offered:
        if not word.startswith("~"):
            override = OverridesParser.create().parse_override(word.replace("TMP", str(files)))
            put(plain, override.key_or_group, override.value())
    return plain


def alternatives(recorded: Recorded) -> Iterator[list[str]]:
    """What the fix of a problem offers, as overrides."""
    by_hand = [words for part, words in BY_HAND.items() if part in recorded.problem.fix]
    known = [] if by_hand else offers(recorded.problem)
    yield from known
    assert known or by_hand, f"neither an override nor known to this test: {recorded.problem}"
    if not known:
        yield from (words for words in by_hand[:1] if words is not None)


def without(given: Sequence[str], field: str) -> list[str]:
    """The overrides of a user who replaces that of a field."""
    top = field.partition("[")[0]
    return [word for word in given if word.partition("=")[0] != top]


@pytest.mark.parametrize(
    "given", CASES, ids=[" ".join(words)[:80].encode("ascii", "replace").decode() for words in CASES]
)
def test_every_fix_that_is_offered_works(given: list[str], files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder(monkeypatch)
    recorded = recorder.of(tree(files, given))
    assert recorded, "no problem"
    for one in recorded:
        for offered in alternatives(one):
            kept = without(given, one.problem.field)
            left = recorder.of(tree(files, kept, offered))
            assert one.is_of not in [other.is_of for other in left], (
                f"{one.problem}\nstays with {offered}:\n" + "\n".join(str(other.problem) for other in left)
            )


def sites(file: str) -> Iterator[tuple[str, range]]:
    """(function, lines) of every place in a source that makes a problem."""
    module = ast.parse((REPOSITORY / "megatron_tempo" / file).read_text())
    for function in ast.walk(module):
        if isinstance(function, ast.FunctionDef):
            for node in ast.walk(function):
                if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "Problem":
                    yield function.name, range(node.lineno, (node.end_lineno or node.lineno) + 1)


def test_every_place_that_makes_a_problem_is_tried(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recorder, reached = Recorder(monkeypatch), set()
    for given in CASES:
        reached |= {recorded.site for recorded in recorder.of(tree(files, given))}
    missed = [
        f"{file}:{lines.start} in {function}"
        for file in FILES
        for function, lines in sites(file)
        if function not in OUTSIDE.get(file, set()) and not any((file, line) in reached for line in lines)
    ]
    assert missed == [], "\n".join(missed)
