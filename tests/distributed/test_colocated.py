"""Whole runs whose servers have the trainer's memory by turns, on a stand-in for a vLLM server that sleeps.

The trainer's storages are really emptied on a CPU too, and the stand-in notes what a GPU would have punished.
"""

from __future__ import annotations

import os
import re
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from megatron_tempo.config.choices import EngineKind, Placement, Transport
from megatron_tempo.config.correction import CorrectionConfig, CorrectionLevel
from megatron_tempo.config.method_settings import GrpoSettings
from megatron_tempo.config.schema import Config
from megatron_tempo.errors import EngineError, InputError
from megatron_tempo.observability.records import read_evaluations, read_metrics
from megatron_tempo.rollout import server_nodes, servers
from megatron_tempo.training.jobs import evaluate, train
from megatron_tempo.weights.folder import FolderWeights
from megatron_tempo.weights.stream import WeightStream
from tests.support.matrix import matrix
from tests.support.project import config_of, write_project
from tests.support.ranks import run_ranks
from tests.support.sleeping_server import Engine, Refused, journal, python

# Calls by letters: an update of an engine that slept, from the first wake to the last call, then requests.
LETTERS = {
    "born": "b",
    "/sleep": "s",
    "/wake_up tags=weights": "w",
    "/wake_up tags=kv_cache": "k",
    "/start_weight_update": "<",
    "/update_weights": "u",
    "/finish_weight_update": ">",
    "/inference/v1/generate": "g",
    "/resume": "r",
    "/reset_prefix_cache": "c",
    "fault": "F",
    "backup": "B",
}
UPDATE = "w<u+>ckcr"


def config_for(tmp_path: Path, *troubles: str, replicas: int = 1) -> Config:
    config = config_of(write_project(tmp_path / "project"), tmp_path / "run")
    config.stage2.iterations, config.rollout.parity_tolerance = 2, 100.0  # its log-probabilities are made up
    config.rollout.engine, config.rollout.placement = EngineKind.vllm, Placement.colocated
    given = config.rollout.servers
    given.python, given.transport, given.checksums_every = str(python(tmp_path / "bin")), Transport.shared, 0
    given.replicas, given.start_seconds, given.restarts = replicas, 60.0, 2
    (tmp_path / "journal").mkdir()
    given.arguments = [f"--journal={tmp_path / 'journal'}", f"--troubles={','.join(troubles)}"]
    config.parallel.bucket_mb = 1
    return config


def trained(config: Config) -> str:
    """What the run says when it stops early."""
    try:
        train(config)
    except (EngineError, InputError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def calls(tmp_path: Path, server: int = 0) -> str:
    """The calls of a server, as letters; calls of other kinds are left out."""
    lines = [line for line in journal(tmp_path / "journal") if line["server"] == server]
    names = [f"{line['what']} {line['query']}" if line["what"] == "/wake_up" else line["what"] for line in lines]
    return "".join(LETTERS.get(name, "") for name in names)


def test_a_run_takes_turns_with_its_server(tmp_path: Path) -> None:
    config = config_for(tmp_path)
    config.parallel.tensor, config.checkpoint.every, config.evaluation.every = 2, 1, 1
    assert run_ranks(trained, 2, tmp_path / "ranks", config) == ["", ""]
    said = calls(tmp_path)
    # Asleep from the start. The parity check, then evaluations, whose critic needs the memory, and two iterations.
    assert re.fullmatch(f"bs({UPDATE}g+s)+", said), said
    assert said.count("w") == 1 + 3 + 2
    metrics = list(read_metrics(tmp_path / "run"))
    assert [line["step"] for line in metrics] == [1, 2]
    assert all(line["engine/staleness_max"] == 0 for line in metrics)
    assert [line["step"] for line in read_evaluations(tmp_path / "run")] == [0, 1, 2]
    # A run that is started again continues from its last checkpoint.
    config.stage2.iterations = 3
    assert run_ranks(trained, 2, tmp_path / "ranks", config) == ["", ""]
    assert "F" not in calls(tmp_path)
    assert [line["step"] for line in read_metrics(tmp_path / "run")] == [1, 2, 3]


@pytest.mark.parametrize(
    ("trouble", "last"),
    [
        ("gone@0:2", ""),  # it dies asleep, which is noticed when it is to wake
        ("load@0:3", "w<u+"),  # it fails in the middle of an update
    ],
)
def test_a_lost_server_starts_again_when_there_is_room(tmp_path: Path, trouble: str, last: str) -> None:
    assert run_ranks(trained, 1, tmp_path / "ranks", config_for(tmp_path, trouble)) == [""]
    first, second = calls(tmp_path)[1:].split("b")
    assert re.fullmatch(f"s({UPDATE}g+s)*{last}", first), first
    # The new one sleeps as soon as it is up, and gets all weights before it answers.
    assert re.fullmatch(f"s({UPDATE}g+s)+", second), second
    assert [line["step"] for line in read_metrics(tmp_path / "run")] == [1, 2]


def test_a_server_lost_among_others_waits_asleep_for_the_next_update(tmp_path: Path) -> None:
    config = config_for(tmp_path, "crash@1:2", replicas=2)
    assert run_ranks(trained, 1, tmp_path / "ranks", config) == [""]
    lines = journal(tmp_path / "journal")
    assert "F" not in calls(tmp_path, 0) + calls(tmp_path, 1)
    again = [line["time"] for line in lines if line["what"] == "born" and line["server"] == 1][1]
    after = [line for line in lines if line["time"] >= again]
    own = next(line["time"] for line in after if line["what"] == "/wake_up" and line["server"] == 1)
    other = [line["what"] for line in after if line["server"] == 0 and line["time"] <= own]
    assert "/sleep" in other or not other, "its requests go to the other, which is not disturbed"
    assert [line["step"] for line in read_metrics(tmp_path / "run")] == [1, 2]


def test_a_server_that_cannot_wake_says_what_to_change_and_the_run_is_saved(tmp_path: Path) -> None:
    config = config_for(tmp_path, "wake@0:4!")
    config.checkpoint.every = 0
    (message,) = run_ranks(trained, 1, tmp_path / "ranks", config)
    assert message.startswith("EngineError: no vLLM server is left; the last one does not get its GPU's memory back: ")
    assert "CUDA Error: out of memory" in message
    assert "rollout.servers.arguments=['--gpu-memory-utilization=" in message
    saved = [int(path.name.removeprefix("step_")) for path in (tmp_path / "run/checkpoints").glob("step_*")]
    steps = [line["step"] for line in read_metrics(tmp_path / "run")]
    assert saved == steps[-1:] == [1]
    assert "step_00000001" in message
    assert "F" not in calls(tmp_path)


def evaluated(config: Config) -> str:
    try:
        evaluate(config)
    except InputError as error:
        return str(error)
    return ""


def test_an_evaluation_takes_turns_with_the_critic(tmp_path: Path) -> None:
    config = config_for(tmp_path)
    config.model.critic_path = config.model.path
    one = config.evaluation.sets["unlabelled"]
    config.evaluation.sets = {"unlabelled": one, "again": one}
    (message,) = run_ranks(evaluated, 1, tmp_path / "ranks", config)
    assert message.startswith("these scores do not measure the model"), "the stand-in answers nothing"
    assert re.fullmatch(f"bs({UPDATE}g+s){{2}}", calls(tmp_path)), calls(tmp_path)


def test_the_stand_in_notes_what_a_gpu_would_punish(tmp_path: Path) -> None:
    """Otherwise the tests above could not fail."""
    engine = Engine(tmp_path, 0, [])
    body = {"sampling_params": {"max_tokens": 2, "n": 1}}

    def faults() -> int:
        return sum(line["what"] == "fault" for line in journal(tmp_path))

    for number, harm in enumerate(
        [
            lambda: engine.generate(body),  # dummy weights
            lambda: (engine.sleep(2), engine.generate(body)),
            lambda: engine.start_weight_update(),
            lambda: (engine.wake_up(["weights"]), engine.wake_up(["kv_cache"]), engine.generate(body)),  # lost ones
            lambda: (engine.start_weight_update(), engine.generate(body)),  # in the middle of an update
        ]
    ):
        with pytest.raises(Refused):
            harm()
        assert faults() == number + 1
    engine.finish_weight_update("1")
    assert engine.generate(body)["choices"][0]["weight_versions"][0]["version"] == "1"


@pytest.mark.parametrize("partial", matrix([False, True], [True]))
def test_a_server_that_sleeps_between_iterations_may_generate_ahead(tmp_path: Path, partial: bool) -> None:
    """It has nothing to do when it is put to sleep: all is answered, or generation was interrupted."""
    config = config_for(tmp_path)
    config.stage2.iterations, config.evaluation.every = 3, 1
    config.rollout.max_staleness, config.rollout.partial_rollouts = 1, partial
    config.rollout.parity_every = 1  # its servers are asked in their turn
    assert run_ranks(trained, 2, tmp_path / "ranks", config) == ["", ""]
    said = calls(tmp_path)
    assert re.fullmatch(f"bs({UPDATE}[gr]*s)+", said), said  # the last iteration has nothing to ask
    assert partial or "gr" not in said, "it is interrupted only with partial rollouts"
    metrics = list(read_metrics(tmp_path / "run"))
    assert [line["step"] for line in metrics] == [1, 2, 3]
    assert [line["engine/staleness_max"] <= 1 for line in metrics] == [True] * 3
    assert all("time/parity" in line for line in metrics)
    if not partial:
        assert [line["engine/staleness_max"] for line in metrics] == [0, 1, 1]
        assert [line["buffer/unfinished"] for line in metrics] == [0, 0, 0]


def test_a_server_that_generates_in_turns_refills(tmp_path: Path) -> None:
    """Its made-up responses are all wrong, so all groups agree, until the limit is reached."""
    config = config_for(tmp_path)
    stage = config.stage2
    stage.settings, stage.unlabelled_prompts, stage.refill_limit, stage.iterations = GrpoSettings(), 0, 12, 3
    config.rollout.max_staleness, config.rollout.partial_rollouts = 1, True
    stage.actor.correction = CorrectionConfig(CorrectionLevel.token, high=2.0)
    config.evaluation.sets, config.evaluation.calibration_set = {}, None
    assert run_ranks(trained, 1, tmp_path / "ranks", config) == [""]
    said = calls(tmp_path)
    assert re.fullmatch(f"bs({UPDATE}[gr]*s)+", said), said
    metrics = list(read_metrics(tmp_path / "run"))
    names = ("refill/asked", "refill/dropped", "refill/agreeing")
    assert [[line[name] for name in names] for line in metrics] == [[12, 4, 8]] * 3
    assert all(line["engine/staleness_max"] <= 1 for line in metrics)


# Several nodes


@dataclass(frozen=True, slots=True)
class Told:
    said: str
    process: int
    streams: int  # of weights
    started: list[int]  # servers


def on_two_nodes(config: Config) -> Told:
    """A rank of four. Ranks 0 and 1 are one node, 2 and 3 the other."""
    rank, streams, started = int(os.environ["RANK"]), 0, []
    os.environ["LOCAL_RANK"] = str(rank % 2)
    socket.gethostname = lambda: f"node{rank // 2}"  # type: ignore[assignment]
    server_nodes.is_loopback = lambda address: False  # both nodes reach it here
    server = servers.Server

    def start(adapter: Any, given: Any, model: Path, work: Path, *more: Any) -> Any:
        started.append(int(work.name))
        return server(adapter, given, model, work, *more)

    servers.Server = start  # type: ignore[assignment, misc]
    for kind in (WeightStream, FolderWeights):

        def from_stages(self: Any, *, original: Any = kind.from_stages, **options: Any) -> Any:
            nonlocal streams
            streams += 1
            return original(self, **options)

        kind.from_stages = from_stages  # type: ignore[method-assign, assignment]
    said = trained(config) if config.stage2.iterations else evaluated(config)
    return Told(said, os.getpid(), streams, started)


def senders(tmp_path: Path, server: int) -> set[int]:
    """The processes whose memory a server has read."""
    lines = journal(tmp_path / "journal")
    return {line["sender"] for line in lines if line["server"] == server and line["what"] == "memory"}


def test_servers_of_two_nodes_take_turns_with_the_trainer_of_their_own_node(tmp_path: Path) -> None:
    """Also one that is started again, on its own node, and is then the only one that gets weights."""
    config = config_for(tmp_path, "load@1:3")
    config.parallel.tensor, config.rollout.servers.each_node = 2, True
    ranks = run_ranks(on_two_nodes, 4, tmp_path / "ranks", config)
    assert [rank.said for rank in ranks] == [""] * 4
    assert [rank.started for rank in ranks] == [[0], [], [1, 1], []]
    first, again = calls(tmp_path, 1)[1:].split("b")
    assert re.fullmatch(f"s({UPDATE}g+s)*w<u+", first), first
    for said in (calls(tmp_path)[1:], again):
        assert re.fullmatch(f"s({UPDATE}[gr]*s)+", said), said
    for server in (0, 1):
        assert senders(tmp_path, server) == {ranks[2 * server].process}, "the first tensor rank of the node's copy"
    assert [line["step"] for line in read_metrics(tmp_path / "run")] == [1, 2]


@pytest.mark.parametrize("each_node", matrix([True, False], [True]))
def test_the_copies_of_a_node_divide_its_servers(tmp_path: Path, each_node: bool) -> None:
    """An evaluation, whose weights come from the model's folder. A node without servers reads nothing of it."""
    config = config_for(tmp_path, replicas=2)
    config.stage2.iterations, config.rollout.servers.each_node = 0, each_node
    ranks = run_ranks(on_two_nodes, 4, tmp_path / "ranks", config)
    assert all(rank.said.startswith("these scores do not measure the model") for rank in ranks)
    started = 4 if each_node else 2
    fed = [senders(tmp_path, server) for server in range(4)]
    assert fed == [{rank.process} for rank in ranks[:started]] + [set()] * (4 - started)
    assert [rank.streams > 0 for rank in ranks] == [True, True, each_node, each_node]
    assert re.fullmatch(f"bs{UPDATE}g+", calls(tmp_path)), calls(tmp_path)
