"""The commands. Hydra composes the YAML files and the overrides; everything after it is the typed configuration.

Hydra gets the tree as plain data and is asked to accept every field, so that unknown fields and wrong types are found
by `config.tree.read`, all of them at once and wherever they stand.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import socket
import sys
import time
import warnings
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError  # type: ignore[import-untyped]

from megatron_tempo.config.benchmarks import BENCHMARKS, preset
from megatron_tempo.config.problem import ConfigErrors, Problem, did_you_mean
from megatron_tempo.config.rules import Purpose, check
from megatron_tempo.config.rules.data import SUFFIXES
from megatron_tempo.config.schema import Config, Verifier, to_plain
from megatron_tempo.config.summary import summary
from megatron_tempo.config.tree import read
from megatron_tempo.errors import EngineError, InputError, NotFiniteError, Stopped, UnwrittenError
from megatron_tempo.plan.search import plan_of, search
from megatron_tempo.plan.shapes import shape_of
from megatron_tempo.plan.split import problems as plan_problems
from megatron_tempo.plan.table import report
from megatron_tempo.status import status
from megatron_tempo.submit import job as jobs
from megatron_tempo.submit.submission import preview, submit

REPOSITORY = Path(__file__).resolve().parent.parent
_GROUPS = ("model", "data", "benchmark", "engine", "algorithm", "experiment", "cluster")
# A job of these kinds whose command line names no run.dir gets a folder of its own below these.
EVAL_DIR, CONVERT_DIR = "runs/eval", "runs/convert"
STOPPED = 75  # exit status of a run that was told to stop: the same command goes on (EX_TEMPFAIL of sysexits.h)

_DESCRIPTION = "TEMPO: test-time training of reasoning models by EM, on Megatron-Core."
_EPILOG = """\
overrides, in Hydra's grammar:
  experiment=quickstart            a preset: configs/experiment/*.yaml
  algorithm=reference              the published code where it departs from the paper
  parallel.tensor=2                one field; docs/configuration.md has the groups
  model=FOLDER                     short for model.path=FOLDER

examples:
  megatron-tempo train experiment=quickstart
  torchrun --nproc-per-node 4 -m megatron_tempo train experiment=quickstart parallel.tensor=2 parallel.pipeline=2
  megatron-tempo check experiment=qwen3_14b_aime parallel.world_size=16 model=FOLDER ...
  megatron-tempo plan  experiment=qwen3_8b_aime cluster=h100x8 --picture memory.png
  megatron-tempo eval  model=FOLDER data=questions.jsonl
  megatron-tempo submit experiment=qwen3_8b_aime cluster=mysite ... --dry-run

eval: data=FILE (.jsonl or .parquet) becomes the evaluation set evaluation.sets.STEM, STEM being the file's name without
its ending. Its fields are prompt_field=prompt, answer_field=answer and verifier=math unless given, as in
evaluation.sets.questions.verifier=countdown. It may be given several times. Of a benchmark=NAME (or [NAME,NAME]) with
the file's name these fields and the suffix are the benchmark's: docs/data.md."""

_COMMANDS = {
    "train": "check the configuration, then train",
    "check": "report every problem of a configuration, without torch",
    "plan": "tell the memory and the time that a configuration will need, and which layouts fit, without torch",
    "eval": "measure avg@k and pass@k of a model",
    "submit": "check the configuration, print its plan, and submit it to SLURM (docs/cluster.md)",
    "serve": "rollout servers on a node of their own; what submit starts there",
}
# Commands that read folders of runs: what they are for, and how many folders they take.
_READERS: dict[str, tuple[str, int | str]] = {
    "status": ("tell what a run is doing, from its folder", 1),
    "report": ("write a run's report.html, or a page that compares several runs", "+"),
    "compare": ("compare two evaluations of the same questions, question by question", 2),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0, 2 where the user has something to mend, 1 where an engine or a disk failed, which may
    be over when the same command is given again, or a plan does not fit, or STOPPED."""
    arguments = _arguments(argv)
    if arguments.command in _READERS:
        return _read(arguments)
    kind = jobs.Kind[arguments.job] if arguments.command == "submit" else None
    purpose = Purpose.__members__.get(kind.name if kind is not None else arguments.command, Purpose.train)
    launched = int(os.environ.get("WORLD_SIZE", "1")) if arguments.command in ("train", "eval") else None  # torchrun's
    try:
        config = build(
            arguments.overrides,
            config_dir=arguments.config_dir,
            purpose=purpose,
            world_size=launched,
            whole=arguments.config,
            submitted=kind,
        )
        if arguments.command == "plan":
            return _plan(config, arguments.picture)
        if kind is not None:
            return _submit(config, kind, arguments)
        if arguments.command == "serve":
            _serve(config, arguments.folder)
        else:
            _run(arguments.command, config)
    except InputError as error:
        # One report a node: what is wrong, such as a file that is not there, may be wrong on one node alone.
        if os.environ.get("LOCAL_RANK", "0") == "0":
            host = "" if os.environ.get("RANK", "0") == "0" else f"{socket.gethostname()}: "
            print(f"{host}{'' if isinstance(error, ConfigErrors) else 'error: '}{error}", file=sys.stderr)
        return 2
    except EngineError as error:  # on the rank that saw it
        print(f"error: {error}", file=sys.stderr)
        return 1
    except Stopped as stopped:
        if os.environ.get("RANK", "0") == "0":
            print(stopped, flush=True)
        return STOPPED
    except (NotFiniteError, UnwrittenError) as error:  # on every rank
        if os.environ.get("RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _quiet() -> None:
    """What Megatron-Core and torch's distributed layer warn of (missing Apex, their own deprecations) is not the
    user's."""
    warnings.filterwarnings("ignore", module=r"megatron(\.|_tempo\.models\.device)|torch\.(distributed|jit)")


def _run(command: str, config: Config) -> None:
    _quiet()
    if command == "check":
        print("ok")
        print(summary(config))
    elif command == "train":
        from megatron_tempo.train import train

        train(config)
    else:
        from megatron_tempo.train import evaluate

        evaluate(config)


def _read(arguments: argparse.Namespace) -> int:
    """The commands that read the folders of runs."""
    runs = [Path(run) for run in arguments.runs]
    try:
        if arguments.command == "status":
            told = status(runs[0])
            print(told.text)
            return 0 if told.well else 1
        if arguments.command == "compare":
            from megatron_tempo.report.results import compare  # numpy and scipy: for this alone

            print(compare(*runs))
            return 0
        from megatron_tempo.report.comparison import write_comparison  # matplotlib: for this alone
        from megatron_tempo.report.html import write_report

        alone = len(runs) == 1 and arguments.out is None
        print(write_report(runs[0]) if alone else write_comparison(runs, Path(arguments.out or "comparison.html")))
        return 0
    except (InputError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _plan(config: Config, picture: str | None) -> int:
    shape = shape_of(config)[0]
    assert shape is not None
    own, plans = plan_of(config, shape), search(config, shape)
    print(report(config, shape, own, plans))
    if picture is not None:
        from megatron_tempo.plan.picture import draw  # matplotlib: for this alone

        try:
            draw(own, Path(picture))
        except (OSError, ValueError) as error:
            raise InputError(f"--picture={picture}: {error}") from error
    return 0 if own.over is None else 1


def _serve(config: Config, folder: str) -> None:
    from megatron_tempo.serve import serve

    _quiet()
    serve(config, Path(folder))


def _submit(config: Config, kind: jobs.Kind, arguments: argparse.Namespace) -> int:
    job = jobs.Job(kind, config, tuple(arguments.words))
    if kind is jobs.Kind.train:
        print(f"{_planned(config)}\n")
    if arguments.dry_run:
        print(preview(job, REPOSITORY), end="")
        return 0
    submit(job, REPOSITORY, arguments.chain, print)
    return 0


def _planned(config: Config) -> str:
    """The plan, or why there is none."""
    if problems := plan_problems(config):
        return f"no plan: {problems[0]}"
    shape = shape_of(config)[0]
    assert shape is not None
    return report(config, shape, plan_of(config, shape), search(config, shape))


def build(
    overrides: Sequence[str],
    *,
    purpose: Purpose = Purpose.train,
    world_size: int | None = None,
    config_dir: str | None = None,
    whole: str | None = None,
    submitted: jobs.Kind | None = None,
) -> Config:
    """The checked configuration. Raises ConfigErrors with everything that is wrong with it.

    `whole` is a config.json that the overrides go over, in place of the tree's defaults. Where it is to be `submitted`
    the cluster is checked too, and `world_size` is as many as the job will start. Where a preset is unknown the rules
    are not checked: most of what they would say follows from its absence.
    """
    plain, problems = _compose(overrides, purpose, config_dir, whole)
    config, unread = read(plain)
    problems += unread
    told = {problem.field for problem in problems}
    if not any(_group_meant(field) for field in told):
        found = list(jobs.problems(config, submitted)) if submitted is not None else []
        if submitted is not None and not found and purpose is not Purpose.convert:
            world_size = jobs.processes(config)
        planned = purpose is Purpose.plan
        found += plan_problems(config) if planned else check(config, world_size=world_size, purpose=purpose)
        if submitted is not None:
            found = [problem for problem in found if not jobs.elsewhere(config, problem)]
        problems += [problem for problem in found if problem.field not in told]
    if problems:
        raise ConfigErrors(problems)
    return config


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("megatron-tempo", description=_DESCRIPTION, epilog=_EPILOG, formatter_class=raw)
    commands = parser.add_subparsers(dest="command", required=True, metavar="|".join([*_COMMANDS, *_READERS]))
    for name, text in _COMMANDS.items():
        command = commands.add_parser(name, help=text, description=text, epilog=_EPILOG, formatter_class=raw)
        command.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="changes to the configuration")
        command.add_argument("--config-dir", metavar="DIR", help="a folder of your own presets, searched as well")
        command.add_argument("--config", metavar="FILE", help="a config.json that the changes go over")
        if name == "plan":
            command.add_argument("--picture", metavar="FILE", help="draw the memory by phase, as a .png, .svg or .pdf")
        elif name == "submit":
            _submit_options(command)
        elif name == "serve":
            command.add_argument("--folder", metavar="DIR", required=True, help="holds the key; gets the addresses")
    for name, (text, count) in _READERS.items():
        reader = commands.add_parser(name, help=text, description=text)
        reader.add_argument("runs", nargs=count, metavar="RUN", help="folder of a run: its run.dir")
        if name == "report":
            reader.add_argument(
                "--out", metavar="FILE", help="where to write a comparison; comparison.html unless given"
            )
    words = list(sys.argv[1:] if argv is None else argv)
    end = words.index("--") if "--" in words else len(words)
    arguments, rest = parser.parse_known_args(words[:end])  # argparse leaves overrides behind an option over
    if unknown := [word for word in rest if word.startswith("-")]:
        parser.error(f"unknown option {unknown[0]}")
    if arguments.command in _READERS:
        if rest:
            parser.error(f"unexpected {rest[0]}")
        return arguments
    arguments.overrides += rest
    arguments.words = words[end + 1 :]
    converts = arguments.command == "submit" and arguments.job == "convert"
    if converts and (not arguments.words or arguments.words[0] not in _CONVERTERS):
        parser.error(f"--job convert wants -- {' or '.join(_CONVERTERS)} and its arguments at the end")
    if arguments.command == "submit" and arguments.chain > 1 and arguments.job != "train":
        parser.error("--chain is for training: nothing else is done in parts")
    if arguments.words and not converts:
        parser.error("what stands behind -- is for submit --job convert")
    return arguments


_CONVERTERS = ("convert_hf_to_megatron", "convert_megatron_to_hf")


def _submit_options(command: argparse.ArgumentParser) -> None:
    kinds = tuple(jobs.Kind.__members__)
    command.add_argument("--job", choices=kinds, default="train", help="what to do (default: train)")
    command.add_argument("--dry-run", action="store_true", help="print the plan and the script, submit nothing")
    command.add_argument(
        "--chain", type=int, choices=range(1, 100), default=1, metavar="N", help="so many jobs, one behind another"
    )


def _compose(
    overrides: Sequence[str], purpose: Purpose, config_dir: str | None, whole: str | None
) -> tuple[dict[str, Any], list[Problem]]:
    """The tree as plain data, without the overrides that cannot be applied, and what is wrong with those."""
    folder = REPOSITORY / "configs"
    if not (folder / "config.yaml").is_file():
        fix = "install from a checkout of the repository with pip install -e"
        raise ConfigErrors([Problem("configs", folder, "holds no config.yaml", fix)])
    if config_dir is not None and not Path(config_dir).is_dir():
        raise ConfigErrors([Problem("--config-dir", config_dir, "is not a folder", "give the folder of your presets")])
    store = ConfigStore.instance()
    store.store(name="defaults", node=to_plain(Config()) if whole is None else _whole(whole))
    for name in (name for name, benchmark in BENCHMARKS.items() if not benchmark.training):
        store.store(group="benchmark", name=name, node=preset(name), package="_global_")
    OmegaConf.register_new_resolver("repo", lambda path: str(REPOSITORY / path), replace=True)
    search = [] if config_dir is None else [f"hydra.searchpath=['file://{Path(config_dir).resolve()}']"]
    with initialize_config_dir(str(folder), version_base="1.3"):
        loader = GlobalHydra.instance().config_loader()
        presets = {group: loader.get_group_options(group, overrides=search) for group in _GROUPS}
        # An eval writes beside no training run and no other eval unless told to. Only one process writes, so that it
        # does no harm where the clocks of several differ.
        folders = {Purpose.eval: EVAL_DIR, Purpose.convert: CONVERT_DIR}
        folder_of = folders.get(purpose) if whole is None else None
        words = [] if folder_of is None else [f"++run.dir={folder_of}/{time.strftime('%Y%m%d-%H%M%S')}"]
        problems: list[Problem] = []
        chosen = [name for text in overrides for name in _benchmarks(text)]
        # A set made by data=FILE comes first, so that its fields can be given in any order.
        for text in sorted(overrides, key=lambda text: not text.startswith("data=")):
            try:
                words += _translate(text, presets, purpose, chosen)
            except ConfigErrors as error:
                problems += error.problems
        try:
            return _plain(search + words), problems
        except _COMPOSING:
            return _plain(_sift(search, words, problems)), problems


def _whole(file: str) -> dict[str, Any]:
    try:
        plain = json.loads(Path(file).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigErrors(
            [Problem("--config", file, f"cannot be read ({error})", "give a run's config.json")]
        ) from error
    if not isinstance(plain, dict):
        raise ConfigErrors([Problem("--config", file, "does not hold an object", "give a run's config.json")])
    return plain


# ValueError and IndexError: OmegaConf's, for a position in a list that is none (evaluation.pass_k.x=1).
_COMPOSING = (HydraException, OmegaConfBaseException, YAMLError, ValueError, IndexError)


def _plain(words: list[str]) -> dict[str, Any]:
    plain: Any = OmegaConf.to_container(compose("config", overrides=words), resolve=True, throw_on_missing=False)
    return plain


def _sift(accepted: list[str], words: list[str], problems: list[Problem]) -> list[str]:
    """`accepted` and those of `words` that Hydra can apply; the others, found by halving, become problems."""
    try:
        _plain(accepted + words)
        return accepted + words
    except _COMPOSING as error:
        if len(words) == 1:
            key, _, value = words[0].partition("=")
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            problems.append(Problem(key.lstrip("+"), value, "; ".join(lines[:3]), "mend it, or the file that it names"))
            return accepted
        if not words:  # the files of configs/ themselves
            raise
    middle = len(words) // 2
    return _sift(_sift(accepted, words[:middle], problems), words[middle:], problems)


def _benchmarks(text: str) -> list[str]:
    """The names in benchmark=NAME or benchmark=[NAME,NAME]."""
    key, _, value = text.partition("=")
    return re.findall(r"\w+", value) if key.lstrip("+") == "benchmark" else []


def _translate(text: str, presets: dict[str, list[str]], purpose: Purpose, benchmarks: list[str]) -> list[str]:
    """One override of the user as Hydra is to see it. Raises ConfigErrors."""
    try:
        override = OverridesParser.create().parse_override(text)
    except HydraException as error:
        fix = "write KEY=VALUE; quote a value with special characters: 'KEY=\"VALUE\"'"
        raise _refused(text, "cannot be read", fix) from error
    if override.is_sweep_override():
        raise _refused(text, "several values are a sweep, which this is not", "give one value, or a list as [a,b]")
    key = override.key_or_group
    if key.startswith("hydra"):
        raise _refused(text, "Hydra's own settings play no part here", "for presets of your own use --config-dir")
    if key in _GROUPS and override.package is None:
        return _preset(override, text, presets[key], purpose, benchmarks)
    if override.is_delete():
        return [text]
    if group := _group_meant(key):
        raise _refused(text, "there is no such group of presets", f"{group}={text.partition('=')[2]}")
    return ["++" + text.lstrip("+")]


def _preset(override: Override, text: str, names: list[str], purpose: Purpose, benchmarks: list[str]) -> list[str]:
    """A choice in a group of presets, or one of the short forms model=FOLDER and data=FILE."""
    group, choice, given = override.key_or_group, override.value(), text.partition("=")[2]
    if override.is_delete() or choice is None or choice in names:
        return [text.lstrip("+")]
    if group == "benchmark" and isinstance(choice, list):
        unknown = [str(name) for name in choice if name not in names]
        if not unknown:
            return [text.lstrip("+")]
        raise _refused(text, f"there is no benchmark {unknown[0]}", did_you_mean(unknown[0], names))
    path = Path(str(choice))
    if group == "model" and (path.exists() or "/" in str(choice)):
        return [f"++model.path={given}"]
    if group == "data" and path.suffix in SUFFIXES:
        if purpose is not Purpose.eval:
            raise _refused(text, "is for eval", f"data.labelled.path={given} or data.unlabelled.path={given}")
        name = re.sub(r"\W", "_", path.stem)
        fields = {"path": given}
        if name not in benchmarks:
            fields |= {"answer_field": "answer", "verifier": Verifier.math.name}
        return [f"++evaluation.sets.{name}.{field}={value}" for field, value in fields.items()]
    raise _refused(text, f"there is no preset of this name in configs/{group}", did_you_mean(str(choice), names))


def _group_meant(key: str) -> str | None:
    """The group of presets that `key` names, perhaps misspelt."""
    close = [] if "." in key else get_close_matches(key, _GROUPS, n=1)
    return close[0] if close else None


def _refused(text: str, wrong: str, fix: str) -> ConfigErrors:
    key, _, value = text.partition("=")
    return ConfigErrors([Problem(key.lstrip("+~"), value, wrong, fix)])
