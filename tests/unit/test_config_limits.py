"""Numbers, names and texts at their limits: a message at once, whatever a few keystrokes ask for."""

from __future__ import annotations

import json
import resource
import time
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_tempo import cli
from megatron_tempo.config import Config, ConfigErrors, Purpose, check
from megatron_tempo.config.cluster import ClusterConfig
from megatron_tempo.config.rules import numbers
from megatron_tempo.config.rules.evaluation import SET_NAME_BYTES
from megatron_tempo.config.rules.layout import divisors
from megatron_tempo.config.schedule import evaluation_point, evaluations_left, remaining, total
from megatron_tempo.config.schema import to_plain
from megatron_tempo.config.set_names import set_name
from megatron_tempo.config.tree import read, strip_optional
from megatron_tempo.errors import EngineError, InputError, Stopped, UnwrittenError, hidden, printable
from tests.unit.config_files import configure, good_overrides, write_all, write_model, write_rows


@pytest.fixture
def files(tmp_path: Path) -> Path:
    write_all(tmp_path)
    return tmp_path


def number_fields(cls: type = Config) -> Iterator[tuple[type, str, type]]:
    """(class, field, type of its numbers) of every number and list of numbers in the tree."""
    for name, hint in typing.get_type_hints(cls).items():
        inner = strip_optional(hint)
        if typing.get_origin(inner) in (dict, list):
            inner = typing.get_args(inner)[-1]
        if inner in (int, float):
            yield cls, name, inner
        elif hasattr(inner, "__dataclass_fields__"):
            yield from number_fields(inner)


def test_every_number_has_two_bounds() -> None:
    fields = set(number_fields())
    assert len(fields) > 80
    for cls, name, _ in fields:
        bound = numbers.bound_of(cls, name)
        assert bound is not None or (cls, name) in numbers.ELSEWHERE, f"{cls.__name__}.{name}"
        assert bound is None or (bound.low >= 0 and bound.high < 2**63)


def test_every_bound_is_held_to_and_says_what_would_do() -> None:
    for cls, name, kind in set(number_fields()):
        if (bound := numbers.bound_of(cls, name)) is None:
            continue
        for bad in (-1, bound.high * 2 + 1, 10**308, float("nan"), float("inf"), *([10**400] if kind is int else [])):
            assert not bound.holds(bad), f"{cls.__name__}.{name}={bad}"
            example = kind(float(bound.fix(bad)))
            assert bound.holds(example) or bound.high > 2**53, f"{cls.__name__}.{name}: {bound.fix(bad)}"


HUGE = ["1000000007", "9223372036854775808", "9" * 309, "9" * 400, "0x" + "f" * 9000]


@pytest.mark.parametrize("huge", HUGE, ids=lambda text: f"{len(text)} digits")
def test_no_number_costs_time_or_memory(huge: str, files: Path) -> None:
    """All fields at once, in each command that reads a configuration."""
    value = int(huge, 0)
    plain = to_plain(configure([*good_overrides(files), "cluster.nodes=2"])) | {"cluster": to_plain(ClusterConfig())}
    plain["rollout"]["servers"]["devices"] = [0]
    for group in (plain, *(node for node in plain.values() if isinstance(node, dict))):
        fill(group, value)
    start, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    config, unread = read(plain)
    for purpose in Purpose:
        problems = [*unread, *check(config, world_size=None, purpose=purpose)]
        assert problems
        assert all(len(str(problem)) < 1500 for problem in problems)
    assert time.process_time() - start < 5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 << 10  # KiB


def fill(node: dict[str, Any], value: int) -> None:
    for name, item in node.items():
        if isinstance(item, dict):
            fill(item, value)
        elif type(item) in (int, float):
            node[name] = value
        elif isinstance(item, list) and item and type(item[0]) is int:
            node[name] = [value]


@pytest.mark.parametrize("field", ["rollout.temperature", "stage1.labelled_prompts", "cluster.gpus_per_node"])
@pytest.mark.parametrize("digits", [309, 4000, 5000])
def test_long_numbers_on_the_command_line(
    field: str, digits: int, files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*good_overrides(files), "cluster=h100x8", f"{field}={'9' * digits}"]
    for command in ("check", "plan"):
        assert cli.main([command, *words]) == 2
        (line,) = capsys.readouterr().err.splitlines()[1:]
        assert field in line
        assert len(line) < 1500


def test_divisors() -> None:
    for number in range(1, 200):
        assert divisors(number) == [i for i in range(1, number + 1) if number % i == 0]
    start = time.process_time()
    assert len(divisors(2**31 - 1)) == 2
    assert time.process_time() - start < 2


@pytest.mark.parametrize(
    ("first", "second", "every"), [(0, 0, 3), (4, 0, 0), (0, 5, 2), (7, 6, 3), (6, 7, 1), (3, 3, 9)]
)
def test_the_schedule_is_what_counting_gives(first: int, second: int, every: int) -> None:
    config = Config()
    config.stage1.iterations, config.stage2.iterations, config.evaluation.every = first, second, every
    config.evaluation.sets = {"a": config.evaluation.sets.get("a")} | {"b": None}  # type: ignore[dict-item]
    steps = [(name, i) for name, n in (("stage1", first), ("stage2", second)) for i in range(n)]
    for done in range(total(config) + 1):
        assert [(name, i) for name, _, i in remaining(config, done)] == steps[done:]
        begun = done + 1 if done else 0
        points = sum(evaluation_point(config, step) is not None for step in range(begun, total(config) + 1))
        assert evaluations_left(config, done) == 2 * points


@pytest.mark.parametrize("size", [10**30, 2**31, 0, -1, "8", None, 1.5, True])
def test_sizes_in_a_model_folder(size: object, files: Path) -> None:
    for name in ("num_hidden_layers", "num_attention_heads", "vocab_size"):
        write_model(files / f"bad_{name}", **{name: size})
        words = [*good_overrides(files), f"model.path={files}/bad_{name}"]
        problems = check(configure(words), world_size=None)
        assert [problem.field for problem in problems] == ["model.path"]
        assert name in problems[0].wrong
        if not isinstance(size, str | float | bool):
            with pytest.raises(ConfigErrors, match=r"config\.json: "):
                cli.build([*words, "cluster=h100x8"], purpose=Purpose.plan)


PATHS = ["run.dir", "model.path", "model.critic_path", "data.labelled.path", "evaluation.sets.heldout.path"]
PATHS += ["rollout.replay", "rewards.judge.key_file"]
JUDGE = ["rewards.judge.url=http://h:1/v1", "rewards.judge.model=m"]


@pytest.mark.parametrize("field", PATHS)
def test_paths_that_no_file_has(field: str, files: Path) -> None:
    loop = files / "loop.jsonl"
    loop.symlink_to(loop)
    (files / "a_file").write_text("")
    below = f"{files}/a_file/b.jsonl"
    for path in (f"{files}/{'a' * 300}.jsonl", f"{files}/{'a/' * 3000}.jsonl", str(loop), below, "~nobody/a.jsonl"):
        problems = check(configure([*good_overrides(files), *JUDGE, f"{field}={path}"]), world_size=None)
        assert [problem.field for problem in problems] in (
            [field],
            [] if field == "run.dir" and path[0] == "~" else [field],
        )


TEXTS = {
    "NUL": "a\x00b",
    "newline": "a\nb",
    "escape": "a\x1b[31mb",
    "DEL": "a\x7fb",
    "C1": "a\x9b31mb",
    "bidi": "a\u202eb",
    "isolate": "a\u2066b",
    "line separator": "a\u2028b",
    "tag": "a\U000e0041b",
    "zero width": "a\u200bb",
    "not UTF-8": "a\udce9b",
}


@pytest.mark.parametrize("text", TEXTS.values(), ids=list(TEXTS))
def test_texts_that_are_not_seen(text: str, files: Path) -> None:
    plain = to_plain(configure(good_overrides(files)))
    plain["run"]["dir"] = plain["model"]["path"] = plain["data"]["labelled"]["path"] = text
    plain["rollout"]["servers"]["arguments"] = ["--fine", text]
    plain["cluster"] = {"slurm": {"environment": {"A": text}}}
    plain["typo" + text] = 1
    (files / "whole.json").write_text(json.dumps(plain))
    with pytest.raises(ConfigErrors) as caught:
        cli.build([], whole=str(files / "whole.json"))
    assert {problem.field for problem in caught.value.problems} == {"--config"}, "the file's, not the command line's"
    fields = {problem.wrong.partition("=")[0] for problem in caught.value.problems}
    where = {"run.dir", "model.path", "data.labelled.path", "rollout.servers.arguments[1]"}
    assert fields == where | {"cluster.slurm.environment.A", "typo" + text}
    assert hidden(str(caught.value)) is None
    assert len(str(caught.value).splitlines()) == 7


def test_texts_that_a_model_reads_have_lines(files: Path) -> None:
    words = ["data.labelled.suffix='a\u200f\n\tb'", "data.labelled.system='e\u0301 👩‍👩‍👧 ‏'"]
    plain = to_plain(configure(good_overrides(files)))
    plain["data"]["labelled"] |= {"suffix": "a\u200f\n\tb", "system": "👩\u200d👧"}
    assert read(plain)[1] == []
    plain["data"]["labelled"] |= {"suffix": "a\x00", "system": "\ud800"}
    assert [problem.field for problem in read(plain)[1]] == ["data.labelled.system", "data.labelled.suffix"], words


def test_errors_are_safe_to_print() -> None:
    hostile = "a\x1b]0;title\x07\x9b2J\u202eb\u2066\ud800\nc\td\r"
    for kind in (InputError, EngineError, Stopped, UnwrittenError):
        message = str(kind(hostile))
        assert hidden(message) is None
        assert message == "a␛]0;title␇<U+009B>2J<U+202E>b<U+2066>\ufffd\nc\td␍"
    assert printable("é 数学 👩\u200d👧 \u0627") == "é 数学 👩\u200d👧 \u0627"


@pytest.mark.parametrize(
    "arguments", [["check", "--no\x1b[31m"], ["status", "a\x9b"], ["check", "run.\x1bx=1"], ["check", "x=\x1b[31m"]]
)
def test_the_command_line_is_told_without_commands(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        raise SystemExit(cli.main(arguments))
    output = capsys.readouterr().err
    assert output
    assert hidden(output) is None


def test_files_named_in_any_script(files: Path) -> None:
    """data=FILE makes a set whose name can stand in an override; what Hydra's grammar would not take is quoted."""
    named = {"数学": "set_872c1f", "24game": "set_24game", "a (b), c": "a__b___c", "é=1": "__1", "x'\"y": "x__y"}
    for stem, name in named.items():
        path = files / f"{stem}.jsonl"
        write_rows(path)
        assert set_name(path) == name
        quoted = str(path).replace('"', '\\"')
        word = f'data="{quoted}"' if "," in stem else f"data={path}"
        words = [word, f"model={files}/model", f"evaluation.sets.{name}.verifier=text"]
        config = cli.build(words, purpose=Purpose.eval)
        assert {key: dataset.path for key, dataset in config.evaluation.sets.items()} == {name: str(path)}
    assert cli.build([*good_overrides(files), f"run.dir={files}/läufe (1)/数学"]).run.dir == f"{files}/läufe (1)/数学"


COMPOSED = {
    "expriment=quickstart": "experiment=quickstart",
    "algorithm=refrence": "algorithm=reference",
    "model=qwen": "model=qwen3_8b",
    "run.seed=1,2": "run.seed=[1,2]",
    "data=TMP/labelled.jsonl": "data.labelled.path=TMP/labelled.jsonl",
    "benchmark=bbq": "benchmark=bbh",
    "run.sed=3": "run.seed=3",
}


@pytest.mark.parametrize("word", COMPOSED)
def test_a_fix_of_an_override_works(word: str, files: Path) -> None:
    def report_of(word: str) -> str:
        try:
            cli.build([*good_overrides(files), word.replace("TMP", str(files))])
        except ConfigErrors as error:
            return str(error)
        return ""

    name, _, value = COMPOSED[word].replace("TMP", str(files)).partition("=")
    before = report_of(word)
    assert (f"{name}={value}" in before) or f"did you mean {name}" in before or f"did you mean {value}" in before
    wrong = before.splitlines()[1].partition(": ")[2].partition(";")[0]
    assert wrong not in report_of(COMPOSED[word])


BROKEN_FILES = {
    "bytes": b"\xff\xfe\x00",
    "deep": b'{"a":' * 5000 + b"1" + b"}" * 5000,
    "less deep": b'{"a":' * 900 + b"1" + b"}" * 900,
    "a list": b"[]",
    "a number": b"3",
    "cut short": b'{"run": {"dir"',
    "an interpolation": b'{"metrics": {"wandb_project": "${nowhere}"}}',
    "a long number": b'{"run": {"seed": ' + b"9" * 5000 + b"}}",
}


@pytest.mark.parametrize("name", BROKEN_FILES)
def test_a_whole_configuration_that_is_broken(name: str, files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (files / "whole.json").write_bytes(BROKEN_FILES[name])
    assert cli.main(["check", "--config", str(files / "whole.json"), *good_overrides(files)]) == 2
    (line,) = capsys.readouterr().err.splitlines()[1:]
    assert line.strip().startswith(f"--config={files}/whole.json: ")
    assert len(line) < 1500


@pytest.mark.long
@pytest.mark.parametrize("preset", [b"\xff\xfe", b"x: " + b"[" * 3000, b"run: {dir: 'a\x1b'}", b"defaults: [it]\n"])
def test_a_preset_that_is_broken(preset: bytes, files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (files / "experiment").mkdir()
    (files / "experiment/it.yaml").write_bytes(b"# @package _global_\n" + preset)
    words = ["check", "--config-dir", str(files), *good_overrides(files), "experiment=it"]
    assert cli.main(words) == 2
    (line,) = capsys.readouterr().err.splitlines()[1:]
    assert "experiment=it: " in line or f"{files}/experiment/it.yaml" in line
    assert hidden(line) is None


def test_long_names_on_the_command_line(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = "a" * 300
    for words in (["--config", name], ["--config-dir", name], [f"model={name}"], [f"evaluation.sets.{name}.path=a"]):
        assert cli.main(["check", *good_overrides(files), *words]) == 2
        (line,) = capsys.readouterr().err.splitlines()[1:]
        assert name[:50] in line
    write_rows(files / f"{name[:240]}.jsonl")
    config = cli.build([f"model={files}/model", f"data={files}/{name[:240]}.jsonl"], purpose=Purpose.eval)
    assert [len(name) for name in config.evaluation.sets] == [SET_NAME_BYTES]


LONG = "9" * 5000
HEX = "0x" + "f" * 5000  # YAML reads it, and Python refuses to print it


@pytest.mark.parametrize(
    "preset",
    [
        *(f"run: {{{field}: {LONG}}}" for field in ("seed", "device")),
        *(f"run: {{{field}: {HEX}}}" for field in ("seed", "device", "deterministic", "no_such_field", "max_skipped")),
        *(f"? {HEX}\n: {value}" for value in ("3", HEX)),
        f"evaluation:\n  pass_k: {HEX}\n  sets:\n    ? {HEX}\n    : {{path: a.jsonl}}",
        f"evaluation: {{pass_k: [{HEX}], every: [{HEX}], samples: {HEX}}}",
        f"rollout: {{temperature: {HEX}, engine: {HEX}, replay: {HEX}}}",
        f"rollout: {{servers: {{devices: [{HEX}], replicas: {HEX}}}}}",
        f"stage1: {{method: {HEX}, iterations: {HEX}, labelled_prompts: {HEX}}}",
        f"cluster: {{slurm: {{time_limit: {HEX}, account: {HEX}}}, nodes: {HEX}}}",
        f"parallel: {{tensor: {HEX}, world_size: {HEX}, pipeline: {HEX}}}",
    ],
)
def test_whole_numbers_that_python_does_not_print(files: Path, preset: str) -> None:
    (files / "own/experiment").mkdir(parents=True)
    (files / "own/experiment/big.yaml").write_text(f"# @package _global_\n{preset}\n")
    for purpose in (Purpose.train, Purpose.plan):
        with pytest.raises(ConfigErrors) as raised:
            cli.build(["experiment=big", *good_overrides(files)], purpose=purpose, config_dir=str(files / "own"))
        assert "digits" in str(raised.value)
        assert "set_int_max_str_digits" not in str(raised.value)
        assert len(str(raised.value)) < 10_000


@pytest.mark.parametrize("option", ["--seed", "--split-heldout"])
@pytest.mark.parametrize("value", [LONG, "x", "1e3", "", "0x10"])
def test_an_option_that_is_no_whole_number(option: str, value: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as leaving:
        cli.main(["prepare", "custom", "a.jsonl", "--out", "b.jsonl", f"{option}={value}"])
    assert leaving.value.code == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert f"argument {option}: " in last
    assert last.endswith(" is not a whole number that can be read")
    assert len(last) < 200


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "run/metrics.jsonl", "run/config.json", "config.json"])
def test_long_numbers_in_files_get_words_of_ours(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(f'{{"prompt": "1+1?", "answer": {LONG}}}\n')
    fields = ["--prompt-field=prompt", "--answer-field=answer", "--verifier=math"]
    words = {
        "a": ["prepare", "custom", str(path), "--out", str(tmp_path / "out.jsonl"), *fields],
        "metrics": ["status", str(tmp_path / "run")],
        "config": ["report", str(path.parent)] if "run" in name else ["plan", "--config", str(path)],
    }[path.stem]
    assert cli.main(words) == 2
    error = capsys.readouterr().err
    assert "a whole number has more than 4300 digits" in error
    assert "set_int_max" not in error
    assert path.name in error
