"""The command line: parses the arguments, builds the configuration, runs a command, returns its exit status."""

from __future__ import annotations

import argparse
import os
import socket
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

from megatron_tempo.config.compose import REPOSITORY, compose_tree, meant_group
from megatron_tempo.config.problem import ConfigErrors
from megatron_tempo.config.rules import Purpose, check
from megatron_tempo.config.schema import Config
from megatron_tempo.config.summary import summary
from megatron_tempo.config.tree import read
from megatron_tempo.errors import EngineError, InputError, NotFiniteError, Stopped, UnwrittenError
from megatron_tempo.plan.search import plan_of, search
from megatron_tempo.plan.shapes import shape_of
from megatron_tempo.plan.split import problems as plan_problems
from megatron_tempo.plan.table import report
from megatron_tempo.report.status import status
from megatron_tempo.submit import job as jobs
from megatron_tempo.submit.submission import preview, submit

STOPPED = 75  # exit status of a run that stopped on request: rerun the same command (EX_TEMPFAIL of sysexits.h)

_DESCRIPTION = "TEMPO: test-time training of reasoning models by EM, on Megatron-Core."
_EPILOG = """\
overrides, in Hydra's syntax:
  experiment=quickstart            a preset: configs/experiment/*.yaml
  algorithm=reference              follow the published code where it differs from the paper
  parallel.tensor=2                set one field; docs/configuration.md lists all fields
  model=FOLDER                     short for model.path=FOLDER

examples:
  megatron-tempo train experiment=quickstart
  torchrun --nproc-per-node 4 -m megatron_tempo train experiment=quickstart parallel.tensor=2 parallel.pipeline=2
  megatron-tempo check experiment=qwen3_14b_aime parallel.world_size=16 model=FOLDER ...
  megatron-tempo plan  experiment=qwen3_8b_aime cluster=h100x8 --picture memory.png
  megatron-tempo eval  model=FOLDER data=questions.jsonl
  megatron-tempo submit experiment=qwen3_8b_aime cluster=mysite ... --dry-run

eval: data=FILE (.jsonl or .parquet) adds the evaluation set evaluation.sets.STEM, where STEM is the file's name without
its suffix. The defaults are prompt_field=prompt, answer_field=answer, and what an exported model was trained with, else
verifier=math. Override them, for example, by evaluation.sets.questions.verifier=countdown. You can give data= several
times. With benchmark=NAME (or [NAME,NAME]), a file of that name uses the benchmark's fields: docs/data.md."""

_COMMANDS = {
    "train": "check the configuration, then train",
    "check": "report every problem of a configuration, without torch",
    "plan": "predict memory and time of a configuration, and list the layouts that fit, without torch",
    "eval": "measure avg@k and pass@k of a model",
    "submit": "check the configuration, print its plan, and submit it to SLURM (docs/cluster.md)",
    "serve": "run rollout servers on this node; submit starts this command on each engine node",
}
# Commands that read run folders: their help, and how many folders they take.
_READERS: dict[str, tuple[str, int | str]] = {
    "status": ("show what a run is doing, from its folder", 1),
    "report": ("write a run's report.html, or a page that compares several runs", "+"),
    "compare": ("compare two evaluations of the same questions, question by question", 2),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status.

    0: success. 1: an engine or a disk failed (a rerun may succeed), the loss was not finite, a plan does not fit, or a
    run needs attention (`status`). 2: the user's input is wrong. STOPPED: the run was asked to stop.
    """
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
        # One report per node: a problem, such as a missing file, may exist on one node only.
        if os.environ.get("LOCAL_RANK", "0") == "0":
            host = "" if os.environ.get("RANK", "0") == "0" else f"{socket.gethostname()}: "
            print(f"{host}{'' if isinstance(error, ConfigErrors) else 'error: '}{error}", file=sys.stderr)
        return 2
    except EngineError as error:  # on the rank where it occurred
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
    """Hide warnings of Megatron-Core and torch's distributed layer (missing Apex, their own deprecations): the user
    cannot act on them."""
    warnings.filterwarnings("ignore", module=r"megatron(\.|_tempo\.models\.device)|torch\.(distributed|jit)")


def _run(command: str, config: Config) -> None:
    _quiet()
    if command == "check":
        print("ok")
        print(summary(config))
    elif command == "train":
        from megatron_tempo.training.jobs import train

        train(config)
    else:
        from megatron_tempo.training.jobs import evaluate

        evaluate(config)


def _read(arguments: argparse.Namespace) -> int:
    """Run one of the commands in `_READERS`."""
    runs = [Path(run) for run in arguments.runs]
    try:
        if arguments.command == "status":
            state = status(runs[0])
            print(state.text)
            return 0 if state.well else 1
        if arguments.command == "compare":
            from megatron_tempo.report.results import compare  # slow imports: numpy and scipy

            print(compare(*runs))
            return 0
        from megatron_tempo.report.comparison import write_comparison  # slow imports: numpy and jinja2
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
        from megatron_tempo.plan.picture import draw  # slow import: matplotlib

        try:
            draw(own, Path(picture))
        except (OSError, ValueError) as error:
            raise InputError(f"--picture={picture}: {error}") from error
    return 0 if own.over is None else 1


def _serve(config: Config, folder: str) -> None:
    from megatron_tempo.rollout.serve import serve

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
    """The plan as text, or the reason why there is none."""
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
    """Build and check the configuration. Raises ConfigErrors with every problem in it.

    `whole`: a config.json that replaces the default tree; the overrides apply on top of it. `submitted`: the kind of a
    job to submit; the cluster is checked too, and `world_size` is the number of processes that the job will start. If a
    preset is unknown, the rules are not checked: most of their problems would follow from the missing preset.
    """
    plain, problems = compose_tree(overrides, purpose, config_dir, whole)
    config, unread = read(plain)
    problems += unread
    reported = {problem.field for problem in problems}
    if not any(meant_group(field) for field in reported):
        violations = list(jobs.problems(config, submitted)) if submitted is not None else []
        if submitted is not None and not violations and purpose is not Purpose.convert:
            world_size = jobs.processes(config)
        planned = purpose is Purpose.plan
        violations += plan_problems(config) if planned else check(config, world_size=world_size, purpose=purpose)
        if submitted is not None:
            violations = [problem for problem in violations if not jobs.elsewhere(config, problem)]
        problems += [problem for problem in violations if problem.field not in reported]
    if problems:
        raise ConfigErrors(problems)
    return config


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("megatron-tempo", description=_DESCRIPTION, epilog=_EPILOG, formatter_class=raw)
    commands = parser.add_subparsers(dest="command", required=True, metavar="|".join([*_COMMANDS, *_READERS]))
    for name, text in _COMMANDS.items():
        command = commands.add_parser(name, help=text, description=text, epilog=_EPILOG, formatter_class=raw)
        command.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="overrides of the configuration")
        command.add_argument("--config-dir", metavar="DIR", help="a folder with presets of your own, searched too")
        command.add_argument("--config", metavar="FILE", help="start from this config.json instead of the defaults")
        if name == "plan":
            command.add_argument(
                "--picture", metavar="FILE", help="plot the memory of each phase, as .png, .svg or .pdf"
            )
        elif name == "submit":
            _submit_options(command)
        elif name == "serve":
            command.add_argument(
                "--folder", metavar="DIR", required=True, help="contains the key; receives the addresses"
            )
    for name, (text, count) in _READERS.items():
        reader = commands.add_parser(name, help=text, description=text)
        reader.add_argument("runs", nargs=count, metavar="RUN", help="folder of a run (its run.dir)")
        if name == "report":
            reader.add_argument("--out", metavar="FILE", help="output of a comparison (default: comparison.html)")
    words = list(sys.argv[1:] if argv is None else argv)
    end = words.index("--") if "--" in words else len(words)
    arguments, rest = parser.parse_known_args(words[:end])  # argparse does not consume overrides after an option
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
        parser.error(f"--job convert: end the command with -- {' or '.join(_CONVERTERS)} and its arguments")
    if arguments.command == "submit" and arguments.chain > 1 and arguments.job != "train":
        parser.error(f"--chain={arguments.chain}: only training can be split into several jobs; use --job train")
    if arguments.words and not converts:
        parser.error("arguments after -- require submit --job convert")
    return arguments


_CONVERTERS = ("convert_hf_to_megatron", "convert_megatron_to_hf")


def _submit_options(command: argparse.ArgumentParser) -> None:
    kinds = tuple(jobs.Kind.__members__)
    command.add_argument("--job", choices=kinds, default="train", help="kind of job (default: train)")
    command.add_argument("--dry-run", action="store_true", help="print the plan and the script; submit nothing")
    command.add_argument(
        "--chain",
        type=int,
        choices=range(1, 100),
        default=1,
        metavar="N",
        help="N jobs; each resumes the one before",
    )
