"""The SGLang engine against a real SGLang server: the weights that it gets, what it says, and how it ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
import torch.distributed as dist
import transformers

from megatron_tempo.config.schema import Config, EngineKind
from megatron_tempo.errors import EngineError
from megatron_tempo.rollout.engine import Request, Sampling
from megatron_tempo.rollout.sglang import SglangEngine
from megatron_tempo.types import Completion
from megatron_tempo.wiring import build_actor, build_engine, open_workplace, weights_of
from tests.support import tiny
from tests.support.ranks import run_ranks

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]

PYTHON = Path(__file__).parents[2] / ".venv-sglang/bin/python"
END = tiny.WORDS.index("$")
FFN = 64  # on a CPU SGLang fills others up, and its checksums are then of something else
PROMPTS = [(5, 7, 8), (9, 4, 1, 2, 3), (60,), tuple(range(20))]
REQUESTS = [Request(prompt, samples=3, seed=i) for i, prompt in enumerate(PROMPTS)]


def write_model(folder: Path, *, tied: bool = False, seed: int = 0) -> Path:
    """With a generation_config.json that must not have a say: by its leave one response alone could come."""
    tiny.write_model(folder, tied=tied, seed=seed, ffn=FFN)
    sampling = {"do_sample": True, "temperature": 0.01, "top_k": 1, "top_p": 0.1, "eos_token_id": END}
    (folder / "generation_config.json").write_text(json.dumps(sampling))
    return folder


def config_of(model: Path, run: Path, tensor: int = 1, pipeline: int = 1) -> Config:
    config = Config()
    config.model.path, config.run.dir = str(model), str(run)
    config.parallel.tensor, config.parallel.pipeline = tensor, pipeline
    config.parallel.bucket_mb = 1
    config.rollout.engine = EngineKind.sglang
    config.rollout.sglang.python = str(PYTHON)
    config.rollout.sglang.arguments = ["--max-total-tokens=4096", "--max-running-requests=32"]
    config.rollout.sglang.start_seconds = 240
    return config


def answers(models: list[Path], run: Path, tensor: int, pipeline: int, temperature: float) -> list[Any]:
    """What the engine says with the weights of each model in turn, on this rank."""
    config = config_of(models[0], run, tensor, pipeline)
    with open_workplace(config) as place:
        engine, said = build_engine(place), []
        try:
            for version, model in enumerate(models):
                config.model.path = str(model)
                engine.load_weights(weights_of(build_actor(place).model, place), version)
                said.append(engine.generate(REQUESTS, Sampling(temperature, max_tokens=8)))
                dist.barrier()  # the first rank's end is the server's
        finally:
            engine.close()
    return said


def assert_said_by(model: Path, said: list[list[Completion]], version: int, temperature: float) -> None:
    """The log-probabilities are those of transformers' model."""
    reference = transformers.AutoModelForCausalLM.from_pretrained(model)
    assert [len(completions) for completions in said] == [3] * len(PROMPTS)
    for prompt, completions in zip(PROMPTS, said, strict=True):
        for completion in completions:
            assert completion.weight_version == version
            assert 1 <= len(completion.token_ids) <= 8
            assert (completion.token_ids[-1] == END) == (completion.finish_reason == "stop")
            tokens = torch.tensor([*prompt, *completion.token_ids])
            with torch.no_grad():
                logs = (reference(tokens[None]).logits[0, len(prompt) - 1 : -1] / temperature).log_softmax(-1)
            wanted = logs.gather(1, tokens[len(prompt) :, None])[:, 0]
            torch.testing.assert_close(torch.tensor(completion.logprobs), wanted, atol=1e-4, rtol=0)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_after_each_sync_it_speaks_with_the_new_weights(tmp_path: Path, tied: bool) -> None:
    """From a model over two tensor ranks and two stages, twice."""
    models = [write_model(tmp_path / f"model{seed}", tied=tied, seed=seed) for seed in (0, 1)]
    by_rank = run_ranks(answers, 4, tmp_path / "ranks", models, tmp_path / "run", 2, 2, 0.7, timeout=500)
    for said in by_rank:
        for version, (model, completions) in enumerate(zip(models, said, strict=True)):
            assert_said_by(model, completions, version, 0.7)
    seen = {completion.token_ids for completions in by_rank[0][0] for completion in completions}
    assert len(seen) > len(PROMPTS), "samples differ"
    ends = {c.finish_reason for rank in by_rank for said in rank for completions in said for c in completions}
    assert ends <= {"stop", "length"}


def spoiled(model: Path, run: Path) -> list[str]:
    """What is said of weight updates that leave out a tensor, name one wrongly, or bring a wrong one."""
    config = config_of(model, run)
    with open_workplace(config) as place:
        engine = build_engine(place)
        actor = build_actor(place)
        try:
            assert isinstance(engine, SglangEngine)
            bucket = [pair for part in weights_of(actor.model, place) for pair in part]
            engine.load_weights([bucket], 0)
            name = "model.layers.2.mlp.down_proj.weight"
            left_out = [pair for pair in bucket if pair[0] != name]
            # SGLang keeps what it had: at another value, that is wrong.
            moved = [(n, t + 1 if n == name else t) for n, t in bucket]
            renamed = [("model.layers.9.mlp.down_proj.weight" if n == name else n, t) for n, t in moved]
            engine.load_weights([moved], 1)
            errors = []
            for spoilt in (left_out, renamed):
                engine._syncs = 0
                try:
                    engine.load_weights([spoilt], 2)
                    errors.append("")
                except EngineError as error:
                    errors.append(str(error))
            unauthorised = httpx.post(f"{engine._client.base_url}/generate", json={"input_ids": [[1]]})
            errors.append(str(unauthorised.status_code))
        finally:
            engine.close()
    return errors


def test_a_spoilt_update_is_seen_and_strangers_are_not_answered(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model")
    (errors,) = run_ranks(spoiled, 1, tmp_path / "ranks", model, tmp_path / "run", timeout=500)
    assert "model.layers.2.mlp.down_proj.weight" in errors[0]
    assert "model.layers." in errors[1]
    assert errors[2] == "401"


def killed(model: Path, run: Path) -> tuple[str, float]:
    """What is said, and after how many seconds, when the server dies while it generates."""
    config = config_of(model, run)
    with open_workplace(config) as place:
        engine = build_engine(place)
        try:
            assert isinstance(engine, SglangEngine)
            assert engine._server is not None
            engine.load_weights(weights_of(build_actor(place).model, place), 0)
            died = []

            def kill() -> None:
                time.sleep(1.0)
                assert engine._server is not None
                died.append(time.monotonic())
                os.killpg(engine._server.process.pid, signal.SIGKILL)

            threading.Thread(target=kill).start()
            try:
                while True:
                    engine.generate([Request((1, 2), samples=8, seed=0)] * 64, Sampling(1.0, max_tokens=32))
            except EngineError as error:
                return str(error), time.monotonic() - died[0]
        finally:
            engine.close()


def test_a_server_that_dies_is_told_of_at_once(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model")
    ((message, seconds),) = run_ranks(killed, 1, tmp_path / "ranks", model, tmp_path / "run", timeout=500)
    assert "SGLang did not answer /generate" in message
    assert "sglang.log" in message
    assert seconds < 5


def test_no_server_outlives_a_trainer_that_is_killed(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model")
    code = (
        "import sys, time\n"
        "from pathlib import Path\n"
        "from megatron_tempo.wiring import build_engine, open_workplace\n"
        "from tests.engines.test_sglang import config_of\n"
        "with open_workplace(config_of(Path(sys.argv[1]), Path(sys.argv[2]))) as place:\n"
        "    engine = build_engine(place)\n"
        "    print(engine._server.process.pid, flush=True)\n"
        "    time.sleep(600)\n"
    )
    command = [sys.executable, "-W", "ignore", "-c", code, str(model), str(tmp_path / "run")]
    trainer = subprocess.Popen(command, cwd=Path(__file__).parents[2], stdout=subprocess.PIPE, text=True)
    assert trainer.stdout is not None
    server = int(trainer.stdout.readline())
    group = os.getpgid(server)
    trainer.kill()
    trainer.wait()
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline and alive(group):
        time.sleep(0.2)
    assert not alive(group)


def alive(group: int) -> bool:
    """Whether any process of the group is left that is not a zombie."""
    states = subprocess.run(["ps", "-o", "pgid=,stat=", "-e"], capture_output=True, text=True, check=True).stdout
    rows = [line.split() for line in states.splitlines()]
    return any(int(pgid) == group and not state.startswith("Z") for pgid, state in rows)


def test_a_model_that_it_cannot_serve_is_told_of_before_anything_is_trained(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model")
    config = (model / "config.json").read_text().replace('"hidden_act": "silu"', '"hidden_act": "sillu"')
    (model / "config.json").write_text(config)
    with pytest.raises(AssertionError, match=r"SGLang ended with exit code .*\n*.*the end of .*sglang\.log"):
        run_ranks(answers, 1, tmp_path / "ranks", [model], tmp_path / "run", 1, 1, 1.0, timeout=500)
