"""The arguments of each command, and its --help. Parsing needs neither torch nor the configuration."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import NoReturn

import megatron_tempo
from megatron_tempo.commands import convert, prepare, rehearse
from megatron_tempo.config.shipped import PACKAGE
from megatron_tempo.errors import printable
from megatron_tempo.submit.job import Kind

_DESCRIPTION = "TEMPO: test-time training of reasoning models by EM, on Megatron-Core."
_EPILOG = """\
first steps:
  megatron-tempo train experiment=quickstart     both stages of the method on a CPU, in minutes
  megatron-tempo presets                         what experiment=, model=, cluster=, ... can name
  megatron-tempo COMMAND --help                  arguments and examples of one command"""
_OVERRIDES = """\
KEY=VALUE, in Hydra's syntax:
  experiment=NAME      choose a preset (megatron-tempo presets lists them)
  run.seed=1           set a field (docs/configuration.md lists them)
  model=FOLDER         short for model.path=FOLDER"""
_EVAL = """\
  data=FILE            the evaluation set evaluation.sets.STEM, where STEM is the file's name without its suffix (.jsonl
                       or .parquet); the defaults are prompt_field=prompt, answer_field=answer and verifier=math, and
                       evaluation.sets.STEM.verifier=countdown overrides one. Can be given several times
  benchmark=NAME       (or [NAME,NAME]) a file of that name uses the benchmark's fields, verifier and suffix"""


@dataclass(frozen=True, slots=True)
class _Command:
    help: str
    examples: tuple[str, ...]
    overrides: str = _OVERRIDES  # what its KEY=VALUE arguments can be; empty if it has none

    @property
    def epilog(self) -> str:
        examples = "\n".join(f"  {example}" for example in self.examples)
        return "\n\n".join(filter(None, [self.overrides, f"examples:\n{examples}" if examples else ""]))


# Commands that build a configuration.
CONFIGURED = {
    "train": _Command(
        "check the configuration, then train; resumes the run that is in run.dir",
        (
            "megatron-tempo train experiment=quickstart",
            "torchrun --nproc-per-node 4 -m megatron_tempo train experiment=quickstart parallel.tensor=2",
        ),
    ),
    "check": _Command(
        "report every problem of a configuration, without torch",
        ("megatron-tempo check experiment=qwen3_14b_aime parallel.world_size=16 model=FOLDER ...",),
    ),
    "plan": _Command(
        "predict memory and time of a configuration, and list the layouts that fit, without torch",
        ("megatron-tempo plan experiment=qwen3_8b_aime cluster=h100x16 --picture memory.png",),
    ),
    "rehearse": _Command(
        "run a configuration's GPU program without a GPU: memory, faults, what it does (docs/rehearsal.md)",
        (
            "megatron-tempo rehearse experiment=qwen3_8b_aime cluster=h100x8",
            "megatron-tempo rehearse experiment=qwen3_8b_aime cluster=h100x8 --lengths lognormal:6000 --json FILE",
        ),
    ),
    "eval": _Command(
        "measure avg@k and pass@k of a model",
        (
            "megatron-tempo eval model=FOLDER data=questions.jsonl",
            "megatron-tempo eval model=FOLDER data=aime2025.jsonl benchmark=aime2025",
        ),
        f"{_OVERRIDES}\n{_EVAL}",
    ),
    "submit": _Command(
        "check the configuration, print its plan, and submit it to SLURM (docs/cluster.md)",
        (
            "megatron-tempo submit experiment=qwen3_8b_aime cluster=mysite ... --dry-run",
            "megatron-tempo submit --job convert cluster=mysite -- hf-to-megatron /models/Qwen3-8B OUT",
        ),
    ),
    "serve": _Command("run rollout servers on this node; submit starts this command on each engine node", ()),
}
# Commands that read run folders, and how many folders they take.
READERS: dict[str, tuple[_Command, int | str]] = {
    "status": (
        _Command("show what a run is doing, from its folder", ("megatron-tempo status runs/quickstart",), ""),
        1,
    ),
    "report": (
        _Command(
            "write a run's report.html, or a page that compares several runs",
            ("megatron-tempo report runs/one", "megatron-tempo report runs/one runs/two --out both.html"),
            "",
        ),
        "+",
    ),
    "compare": (
        _Command(
            "compare two evaluations of the same questions, question by question",
            ("megatron-tempo compare runs/eval/20260102-030405 runs/eval/20260102-040506",),
            "",
        ),
        2,
    ),
}
PRESETS = _Command(
    "list the presets: experiments, models, data sets, benchmarks, engines, algorithms, clusters",
    ("megatron-tempo presets", "megatron-tempo presets cluster"),
    "",
)
_RAW = argparse.RawDescriptionHelpFormatter


class _Parser(argparse.ArgumentParser):
    """Its errors quote arguments, and are safe to print."""

    def error(self, message: str) -> NoReturn:
        super().error(printable(message))


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The arguments of one command. Exits as argparse does: 0 for --help and --version, 2 for wrong usage."""
    parser = _parser()
    words = list(sys.argv[1:] if argv is None else argv)
    end = words.index("--") if "--" in words else len(words)
    arguments, rest = parser.parse_known_args(words[:end])  # argparse does not consume overrides after an option
    usage = _usage(parser, arguments.command)
    if unknown := [word for word in rest if word.startswith("-")]:
        usage(f"unknown option {unknown[0]}")
    if arguments.command not in CONFIGURED:
        if rest or words[end:]:
            usage(f"unexpected {[*rest, *words[end:]][0]}")
        return arguments
    arguments.overrides += rest
    arguments.words = words[end + 1 :]
    converts = arguments.command == "submit" and arguments.job == "convert"
    if converts:
        arguments.words = _conversion(arguments.words, usage)
    if arguments.command == "submit" and arguments.chain > 1 and arguments.job != "train":
        usage(f"--chain={arguments.chain}: only training can be split into several jobs; use --job train")
    if arguments.words and not converts:
        usage("arguments after -- require submit --job convert")
    return arguments


def _usage(parser: argparse.ArgumentParser, command: str) -> Callable[[str], object]:
    """Ends the program with a message and the usage of the command."""
    (commands,) = (action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    subparser = commands.choices[command]
    assert isinstance(subparser, argparse.ArgumentParser)
    return subparser.error


def _conversion(words: list[str], usage: Callable[[str], object]) -> list[str]:
    """The arguments of `convert`, checked before they wait in a queue. The names of the scripts in tools/ still do."""
    if words:
        words = [convert.SCRIPTS.get(words[0], words[0]), *words[1:]]
    if not words or words[0] not in convert.DIRECTIONS:
        usage(f"--job convert: end the command with -- {' or '.join(convert.DIRECTIONS)} and its arguments")
    parser = _Parser("megatron-tempo convert")
    convert.add_arguments(parser)
    parser.parse_args(words)
    return words


def _parser() -> argparse.ArgumentParser:
    parser = _Parser("megatron-tempo", description=_DESCRIPTION, epilog=_EPILOG, formatter_class=_RAW)
    parser.add_argument("--version", action="version", version=_versions())
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", title="commands")
    for name, command in CONFIGURED.items():
        added = _add(commands, name, command)
        added.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="overrides of the configuration")
        added.add_argument("--config-dir", metavar="DIR", help="a folder with presets of your own, searched too")
        added.add_argument("--config", metavar="FILE", help="start from this config.json instead of the defaults")
        if name == "plan":
            added.add_argument("--picture", metavar="FILE", help="plot the memory of each phase, as .png, .svg or .pdf")
        elif name == "rehearse":
            rehearse.add_options(added)
        elif name == "submit":
            _submit_options(added)
        elif name == "serve":
            added.add_argument("--folder", metavar="DIR", required=True, help="has the key; receives the addresses")
    for name, (command, count) in READERS.items():
        reader = _add(commands, name, command)
        reader.add_argument("runs", nargs=count, metavar="RUN", help="folder of a run (its run.dir)")
        if name == "report":
            reader.add_argument("--out", metavar="FILE", help="output of a comparison (default: comparison.html)")
    presets = _add(commands, "presets", PRESETS)
    presets.add_argument("group", nargs="?", metavar="GROUP", help="only this group, such as experiment")
    presets.add_argument("--config-dir", metavar="DIR", help="a folder with presets of your own, listed too")
    convert.add_arguments(_add(commands, "convert", _Command(convert.HELP, convert.EXAMPLES, "")))
    prepare.add_arguments(_add(commands, "prepare", _Command(prepare.HELP, prepare.EXAMPLES, "")))
    return parser


def _add(commands: argparse._SubParsersAction[_Parser], name: str, command: _Command) -> argparse.ArgumentParser:
    return commands.add_parser(
        name, help=command.help, description=command.help, epilog=command.epilog, formatter_class=_RAW
    )


def _submit_options(command: argparse.ArgumentParser) -> None:
    kinds = tuple(Kind.__members__)
    command.add_argument("--job", choices=kinds, default="train", help="kind of job (default: train)")
    command.add_argument("--dry-run", action="store_true", help="print the plan and the script; submit nothing")
    command.add_argument(
        "--chain",
        type=prepare.whole_number,
        choices=range(1, 100),
        default=1,
        metavar="N",
        help="N jobs; each resumes the one before",
    )


def _versions() -> str:
    """Versions for a bug report: this package and its location, the packages that affect its numbers, and Python."""
    parts = [f"megatron-tempo {megatron_tempo.__version__} in {PACKAGE}"]
    for name in ("megatron-core", "torch", "transformers"):
        try:
            parts.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            parts.append(f"{name} not installed")
    return f"{', '.join(parts)}, Python {sys.version.split()[0]}"
