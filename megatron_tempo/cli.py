"""The command line: parses the arguments, builds the configuration, runs a command, returns its exit status."""

from __future__ import annotations

import argparse
import os
import re
import signal
import socket
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from megatron_tempo.commands import code_sandbox, convert, prepare, rehearse
from megatron_tempo.commands.arguments import READERS, parse
from megatron_tempo.commands.presets import listing
from megatron_tempo.config.compose import REPOSITORY, attributed, compose_tree, meant_group
from megatron_tempo.config.problem import ConfigErrors, Problem
from megatron_tempo.config.rules import Purpose, check
from megatron_tempo.config.schema import Config
from megatron_tempo.config.summary import summary
from megatron_tempo.config.tree import read
from megatron_tempo.errors import EngineError, InputError, NotFiniteError, Stopped, UnwrittenError, printable
from megatron_tempo.nullgpu.guard import refuse_null_gpu
from megatron_tempo.observability import logs
from megatron_tempo.observability.terminal import standard_streams
from megatron_tempo.plan.search import plan_of, search
from megatron_tempo.plan.shapes import shape_of
from megatron_tempo.plan.split import problems as plan_problems
from megatron_tempo.plan.table import report
from megatron_tempo.rehearsal.problems import problems as rehearsal_problems
from megatron_tempo.report.status import status
from megatron_tempo.runtime.launcher import is_restarted_on_failure, launched_processes
from megatron_tempo.submit import job as jobs
from megatron_tempo.submit.submission import preview, submit

STOPPED = 75  # exit status of a run that stopped on request: rerun the same command (EX_TEMPFAIL of sysexits.h)
# How long other ranks wait with the same error: torchrun ends all ranks of a node as soon as one has ended.
REPORT_SECONDS = 5.0


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status.

    0: success. 1: an engine or a disk failed (a rerun may succeed), the loss was not finite, a plan does not fit, a
    rehearsal found a fault, or a run needs attention (`status`). 2: the user's input is wrong. STOPPED: the run was
    asked to stop; 0 under torchrun --max-restarts. 130: Ctrl-C.
    """
    _quiet()
    logs.configure(rank=logs.rank_of())
    try:
        with standard_streams():
            return _dispatch(parse(argv))
    except KeyboardInterrupt:
        with suppress(ValueError):  # not the main thread
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # again: at once
        if os.environ.get("RANK", "0") == "0":
            print("stopped by Ctrl-C", file=sys.stderr)
        return 128 + signal.SIGINT


def _dispatch(arguments: argparse.Namespace) -> int:
    if arguments.command in READERS:
        return _read(arguments)
    if arguments.command in _ALONE:
        return _ALONE[arguments.command](arguments)
    kind = jobs.Kind[arguments.job] if arguments.command == "submit" else None
    purpose = Purpose.__members__.get(kind.name if kind is not None else arguments.command, Purpose.train)
    try:
        if arguments.command in ("train", "eval", "serve"):
            refuse_null_gpu(arguments.command)  # before anything is read: nothing of it can be used
        launched = launched_processes() if arguments.command in ("train", "eval") else None
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
        if arguments.command == "rehearse":
            return rehearse.run(config, arguments)
        if kind is not None:
            return _submit(config, kind, arguments)
        if arguments.command == "serve":
            _serve(config, arguments.folder)
        else:
            _run(arguments.command, config)
    except InputError as error:
        # One report per node: a problem, such as a missing file, may exist on one node only.
        if os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0")) == "0":
            host = "" if os.environ.get("RANK", "0") == "0" else f"{socket.gethostname()}: "
            print(f"{host}{'' if isinstance(error, ConfigErrors) else 'error: '}{error}", file=sys.stderr)
        else:
            time.sleep(REPORT_SECONDS)
        return 2
    except EngineError as error:  # on the rank where it occurred
        print(f"error: {error}", file=sys.stderr)
        return 1
    except Stopped as stopped:
        if os.environ.get("RANK", "0") == "0":
            print(stopped, flush=True)
        return 0 if is_restarted_on_failure() else STOPPED  # otherwise torchrun would restart a stopped run
    except (NotFiniteError, UnwrittenError) as error:  # on every rank
        if os.environ.get("RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr)
        return 1
    except OSError as error:  # of a file, on the rank where it occurred
        if error.filename is None:
            raise
        print(printable(f"error: {error.filename}: {error.strerror}"), file=sys.stderr)
        return 1 if arguments.command in ("train", "eval", "serve") else 2  # the others only read what the user gave
    return 0


def _presets(arguments: argparse.Namespace) -> int:
    try:
        text = listing(arguments.group, arguments.config_dir)
    except (InputError, OSError) as error:
        print(printable(f"error: {error}"), file=sys.stderr)
        return 2
    print(printable(text))
    return 0


# Commands that read neither a configuration nor a run.
_ALONE: dict[str, Callable[[argparse.Namespace], int]] = {
    "presets": _presets,
    "convert": convert.run,
    "prepare": prepare.run,
}


def _quiet() -> None:
    """Hide warnings of Megatron-Core and torch's distributed layer (missing Apex, their own deprecations): the user
    cannot act on them."""
    warnings.filterwarnings("ignore", module=r"megatron(\.|_tempo\.models\.)|torch\.(distributed|jit)")


def _run(command: str, config: Config) -> None:
    if command == "check":
        from megatron_tempo.data.copies import check_data  # slow imports for large sets: pyarrow and numpy

        findings = [*check_data(config), *code_sandbox.findings(config)]
        print("ok")
        print("\n".join([summary(config), *(f"  {line}" for line in findings)]))
        return
    from megatron_tempo.data.question_rows import check_rows

    # Before the imports that take the longest: torch, transformers, Megatron.
    training = [config.data.labelled, config.data.unlabelled] if command == "train" else []
    check_rows(filter(None, [*training, *config.evaluation.sets.values()]))
    from megatron_tempo.models.megatron_compat.transformer_engine import check_import

    check_import()  # before the first import of Megatron-Core
    if command == "train":
        from megatron_tempo.training.jobs import train

        train(config)
    else:
        from megatron_tempo.training.jobs import evaluate

        evaluate(config)


def _read(arguments: argparse.Namespace) -> int:
    """Run one of the commands in `READERS`."""
    try:
        text, code = _read_text(arguments)
    except (InputError, OSError) as error:
        print(printable(f"error: {error}"), file=sys.stderr)
        return 2
    print(text)
    return code


def _read_text(arguments: argparse.Namespace) -> tuple[str, int]:
    """What the command prints, and its exit status."""
    runs = [Path(run) for run in arguments.runs]
    if arguments.command == "status":
        state = status(runs[0])
        return state.text, 0 if state.well else 1
    if arguments.command == "compare":
        from megatron_tempo.report.results import compare  # slow imports: numpy and scipy

        return compare(*runs), 0
    from megatron_tempo.report.comparison import write_comparison  # slow import: matplotlib
    from megatron_tempo.report.html import write_report

    alone = len(runs) == 1 and arguments.out is None
    return str(write_report(runs[0]) if alone else write_comparison(runs, Path(arguments.out or "comparison.html"))), 0


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

    serve(config, Path(folder))


def _submit(config: Config, kind: jobs.Kind, arguments: argparse.Namespace) -> int:
    job = jobs.Job(kind, config, tuple(arguments.words))
    if kind is jobs.Kind.train:
        print(f"{_planned(config)}\n")
    if arguments.dry_run:
        print(preview(job, REPOSITORY), end="")
        return 0
    print(printable(submit(job, REPOSITORY, arguments.chain)))
    return 0


def _planned(config: Config) -> str:
    """The plan as text, or the reason why there is none."""
    if problems := plan_problems(config):
        return f"no plan: {problems[0]}"
    shape = shape_of(config)[0]
    assert shape is not None
    return report(config, shape, plan_of(config, shape), search(config, shape))


# The problems, as patterns of fields, that follow in an evaluation if model=NAME or data=NAME names nothing.
_FOLLOWING = {"model": r"model\..*", "data": r"evaluation\.sets"}


def _violations(config: Config, world_size: int | None, purpose: Purpose) -> list[Problem]:
    """The rules that a configuration breaks, for what is to be done with it."""
    if purpose is Purpose.plan:
        return plan_problems(config)
    if purpose is Purpose.rehearse:
        return rehearsal_problems(config)
    return check(config, world_size=world_size, purpose=purpose)


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
    preset is unknown, the rules are not checked: most of their problems would follow from the missing preset. Those of
    an evaluation are, except for what follows from its missing model or data.
    """
    plain, problems = compose_tree(overrides, purpose, config_dir, whole)
    config, unread = read(plain)
    reported = {problem.field for problem in [*problems, *unread]}
    problems += attributed(unread, whole)
    unknown = {group for field in reported if (group := meant_group(field))}
    if not unknown or (purpose is Purpose.eval and unknown <= set(_FOLLOWING)):
        following = "|".join(_FOLLOWING[group] for group in unknown)
        violations = list(jobs.problems(config, submitted)) if submitted is not None else []
        if submitted is not None and not violations and purpose is not Purpose.convert:
            world_size = jobs.processes(config)
        violations += _violations(config, world_size, purpose)
        if submitted is not None:
            violations = [problem for problem in violations if not jobs.elsewhere(config, problem)]
        violations = [problem for problem in violations if problem.field not in reported]
        problems += [problem for problem in violations if not re.fullmatch(following, problem.field)]
    if problems:
        raise ConfigErrors(problems)
    return config
