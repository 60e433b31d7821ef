"""What sampling settings become in the requests to servers, and where they come from in a configuration."""

from __future__ import annotations

import json
import pickle
import re
from pathlib import Path
from typing import Any

import pytest

from megatron_tempo.config.choices import EngineKind, EnginePrecision
from megatron_tempo.config.sampled import evaluation_seed, evaluation_stop, rollout_seed, stop_strings
from megatron_tempo.config.schema import Config, ServersConfig
from megatron_tempo.config.trained_with import endings, trained_with
from megatron_tempo.kernels.truncation import Truncation
from megatron_tempo.report.results import results_table
from megatron_tempo.report.summary import sampled_words
from megatron_tempo.rollout.build import server_adapter_of
from megatron_tempo.rollout.engine import Request, Sampling
from megatron_tempo.rollout.server_adapter import Launch, Start
from megatron_tempo.rollout.sglang import Sglang, _stop_pattern
from megatron_tempo.rollout.vllm import Vllm
from megatron_tempo.training.jobs import _about
from tests.support.tiny import write_model

REQUEST = Request((5, 6), samples=3, seed=2**63 - 1)
PLAIN = Sampling(0.7, 8)
FULL = Sampling(0.6, 8, 0.95, 20, 0.01, ("</answer>", "é+"), seeded=True)


def test_settings_come_from_rollout_and_from_evaluation() -> None:
    config = Config()
    assert Sampling.of(config.rollout, 9) == Sampling(1.0, 9)
    config.rollout.top_k, config.rollout.stop, config.rollout.seed = 20, ["a"], 4
    config.evaluation.temperature, config.evaluation.top_p = 0.6, 0.95
    assert Sampling.of(config.rollout, 9) == Sampling(1.0, 9, top_k=20, stop=("a",), seeded=True)
    assert Sampling.of(config.evaluation, 7) == Sampling(0.6, 7, top_p=0.95)
    assert (rollout_seed(config), evaluation_seed(config)) == (4, 0)
    assert (evaluation_stop(config), stop_strings(config)) == (["a"], ["a"])
    config.evaluation.stop, config.evaluation.seed = ["b"], 5
    assert (evaluation_stop(config), stop_strings(config), evaluation_seed(config)) == (["b"], ["a", "b"], 5)


def test_greedy_and_whole_distributions_are_not_truncated() -> None:
    assert PLAIN.truncation is None
    assert Sampling(0.0, 8, top_p=0.5).truncation is None
    assert FULL.truncation == Truncation(0.95, 20, 0.01)
    assert Sampling(1.0, 8, min_p=0.1).truncation == Truncation(min_p=0.1)


def test_vllm_gets_every_setting() -> None:
    body = Vllm(cpu=True, tensor=1, stops=True).generate(REQUEST, FULL, [7]).body
    assert body is not None
    wanted = {
        "n": 3,
        "temperature": 0.6,
        "top_p": 0.95,
        "top_k": 20,
        "min_p": 0.01,
        "max_tokens": 8,
        "logprobs": 0,
        "stop_token_ids": [7],
        "ignore_eos": True,
        "detokenize": True,
        "skip_special_tokens": False,
        "stop": ["</answer>", "é+"],
        "include_stop_str_in_output": True,
        "seed": 2**62 - 1,
    }
    assert body["sampling_params"] == wanted
    plain = Vllm(cpu=True, tensor=1).generate(REQUEST, PLAIN, [7]).body
    assert plain is not None
    assert (plain["sampling_params"]["top_k"], plain["sampling_params"]["detokenize"]) == (0, False)
    assert not {"seed", "stop"} & set(plain["sampling_params"])


def test_sglang_gets_our_truncation_and_a_seed_for_each_sample() -> None:
    body = Sglang(cpu=False, tensor=1, truncates=True).generate(REQUEST, FULL, [7]).body
    assert body is not None
    entries = body["sampling_params"]
    assert body["input_ids"] == [[5, 6]] * 3
    assert [entry["n"] for entry in entries] == [1, 1, 1]
    assert len({entry["sampling_seed"] for entry in entries}) == 3
    assert all(0 <= entry["sampling_seed"] < 2**63 for entry in entries)
    for entry in entries:
        assert (entry["top_p"], entry["top_k"], entry["min_p"]) == (1.0, -1, 0.0), "SGLang's own do nothing"
        assert entry["custom_params"] == {"temperature": 0.6, "top_p": 0.95, "top_k": 20, "min_p": 0.01}
    plain = Sglang(cpu=False, tensor=1).generate(REQUEST, PLAIN, [7]).body
    assert plain is not None
    assert plain["input_ids"] == [[5, 6]]
    assert plain["sampling_params"]["n"] == 3
    assert not {"custom_logit_processor"} & set(plain)


def test_the_processor_is_named_and_not_sent() -> None:
    """SGLang unpickles it: the pickle has the name of a class in a module that we gave the server."""
    body = Sglang(cpu=False, tensor=1, truncates=True).generate(REQUEST, FULL, [7]).body
    assert body is not None
    pickled = bytes.fromhex(json.loads(body["custom_logit_processor"])["callable"])

    class Names(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            return module, name

    import io

    assert Names(io.BytesIO(pickled)).load() == ("megatron_tempo_sglang", "TruncationProcessor")


@pytest.mark.parametrize("string", ["</answer>", "a|b", "é+", "\n\n", "[x]{3}"])
def test_sglangs_pattern_finds_the_string_and_nothing_else(string: str) -> None:
    pattern = _stop_pattern(string)
    assert re.search(pattern, f"some {string} text")
    assert re.search(pattern, "some text " * 100) is None
    assert re.search(pattern, "") is None
    assert len(_stop_pattern("+" * 64).encode()) <= 256, "SGLang refuses longer ones"


def launch_of(config: Config, folder: Path) -> Launch:
    model = write_model(folder / "model")
    config.model.path = str(model)
    adapter = server_adapter_of(config, cpu=True)
    own = folder / "server"
    own.mkdir()
    return adapter.launch(Start(ServersConfig(), model, own, "127.0.0.1", 1234, "key", EnginePrecision.fp32))


@pytest.mark.parametrize(
    ("prompt", "response", "evaluated", "longest"), [(20, 30, None, 50), (20, 30, 40, 60), (200, 99, 9, 256)]
)
def test_vllms_servers_have_room_for_the_longest_row_not_for_all_positions_of_the_model(
    tmp_path: Path, prompt: int, response: int, evaluated: int | None, longest: int
) -> None:
    """A server does not start without room for one row of --max-model-len, by default all 256 positions."""
    config = Config()
    config.rollout.engine = EngineKind.vllm
    config.rollout.max_prompt_tokens, config.rollout.max_response_tokens = prompt, response
    config.evaluation.max_response_tokens = evaluated
    assert f"--max-model-len={longest}" in launch_of(config, tmp_path).command


@pytest.mark.parametrize("where", ["rollout", "evaluation"])
def test_sglangs_servers_get_the_modules_only_if_they_are_needed(tmp_path: Path, where: str) -> None:
    config = Config()
    config.rollout.engine = EngineKind.sglang
    (tmp_path / "plain").mkdir()
    launch = launch_of(config, tmp_path / "plain")
    assert "--enable-custom-logit-processor" not in launch.command
    assert not list(Path(launch.environment["PYTHONPATH"]).glob("megatron_tempo_truncation.py"))
    getattr(config, where).top_p = 0.9
    (tmp_path / "truncated").mkdir()
    launch = launch_of(config, tmp_path / "truncated")
    assert "--enable-custom-logit-processor" in launch.command
    for name in ("megatron_tempo_sglang.py", "megatron_tempo_truncation.py"):
        path = Path(launch.environment["PYTHONPATH"]) / name
        compile(path.read_text(), path, "exec")


@pytest.mark.parametrize("where", ["rollout", "evaluation"])
def test_vllms_servers_read_text_only_if_stop_strings_need_it(tmp_path: Path, where: str) -> None:
    config = Config()
    config.rollout.engine = EngineKind.vllm
    (tmp_path / "plain").mkdir()
    assert "--tokens-only" in launch_of(config, tmp_path / "plain").command
    getattr(config, where).stop = ["x"]
    (tmp_path / "stops").mkdir()
    command = launch_of(config, tmp_path / "stops").command
    assert "--enable-scale-out" in command
    assert "--tokens-only" not in command


def test_an_exported_model_is_evaluated_with_its_stop_strings() -> None:
    config = Config()
    config.rollout.stop = ["</answer>"]
    assert endings(trained_with(config))["stop"] == ["</answer>"]
    assert "stop" not in endings(trained_with(Config()))
    for wrong in (3, "x", [3], []):
        assert "stop" not in endings({"stop": wrong})


def test_results_say_how_responses_were_sampled() -> None:
    config = Config()
    config.evaluation.temperature, config.evaluation.top_k, config.rollout.stop = 0.6, 20, ["x"]
    about = _about(config)
    named = {name: about[name] for name in ("temperature", "top_p", "top_k", "min_p", "stop", "sampling_seed")}
    assert list(named.values()) == [0.6, 1.0, 20, 0.0, ["x"], None]
    assert "sampling: temperature 0.6, top_k 20, stop ['x']" in results_table(about, [])


def test_a_report_says_how_responses_were_sampled() -> None:
    assert sampled_words({"temperature": 1.0}) == "temperature 1.0"
    assert sampled_words({"temperature": 0.0, "top_p": 1.0, "top_k": None, "min_p": 0.0, "stop": []}) == "greedy"
    qwen3 = {"temperature": 0.6, "top_p": 0.95, "top_k": 20, "min_p": 0.0, "stop": ["x"]}
    assert sampled_words(qwen3) == "temperature 0.6, top_p 0.95, top_k 20, stop ['x']"
