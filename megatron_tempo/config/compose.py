"""Composes the YAML files and the overrides by Hydra, before they become the typed configuration.

Hydra gets the tree as plain data and accepts every field, so that `config.tree.read` reports all unknown fields and
wrong types at once.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError  # type: ignore[import-untyped]

from megatron_tempo.config.benchmarks import BENCHMARKS, preset
from megatron_tempo.config.choices import EngineKind, Placement, Verifier
from megatron_tempo.config.own_presets import check_presets
from megatron_tempo.config.problem import ConfigErrors, Problem, did_you_mean, show
from megatron_tempo.config.rules import Purpose
from megatron_tempo.config.rules.data import SUFFIXES
from megatron_tempo.config.rules.files import wrong_with_folder
from megatron_tempo.config.schema import Config, RolloutConfig, to_plain
from megatron_tempo.config.set_names import set_name, set_names_of
from megatron_tempo.config.shipped import REPOSITORY
from megatron_tempo.config.trained_with import defaults_for, endings, read_trained_with
from megatron_tempo.config.tree import MISSING, read, without_default_settings
from megatron_tempo.errors import InputError
from megatron_tempo.files import read_json

GROUPS = ("model", "data", "benchmark", "engine", "algorithm", "experiment", "cluster")
_DEFAULT_ALGORITHM = "paper"  # as in configs/config.yaml
# A job of these kinds whose command line names no run.dir gets a folder of its own below these.
EVAL_DIR, CONVERT_DIR = "runs/eval", "runs/convert"


def compose_tree(
    overrides: Sequence[str], purpose: Purpose, config_dir: str | None, whole: str | None
) -> tuple[dict[str, Any], list[Problem]]:
    """The tree as plain data, without the overrides that cannot be applied, and the problems of those."""
    folder = REPOSITORY / "configs"
    if not (folder / "config.yaml").is_file():
        fix = "run `pip install .` in a checkout of the repository"
        raise ConfigErrors([Problem("configs", folder, "has no config.yaml", fix)])
    if config_dir is not None and (wrong := wrong_with_folder(Path(config_dir))):
        raise ConfigErrors([Problem("--config-dir", config_dir, wrong, "give the folder of your presets")])
    if config_dir is not None:
        check_presets(Path(config_dir), GROUPS, overrides)
    defaults = to_plain(Config()) if whole is None else _whole(whole)
    ConfigStore.instance().store(name="defaults", node=without_default_settings(defaults))
    _store_benchmarks()
    _register_resolvers()
    search = [] if config_dir is None else [f"hydra.searchpath=['file://{Path(config_dir).resolve()}']"]
    with initialize_config_dir(str(folder), version_base="1.3"):
        folders = [folder] if config_dir is None else [folder, Path(config_dir)]
        presets = cache(lambda group: _presets(folders, group))
        # By default, an eval gets a folder of its own. Only one process writes, so it does not matter if the clocks of
        # several differ.
        run_dirs = {Purpose.eval: EVAL_DIR, Purpose.convert: CONVERT_DIR}
        run_dir = run_dirs.get(purpose) if whole is None else None
        words = [] if run_dir is None else [f"++run.dir={run_dir}/{_own_name()}"]
        problems: list[Problem] = []
        if purpose is Purpose.eval:
            overrides = [one for text in overrides for one in _single_files(text)]
        chosen = [name for text in overrides for name in _benchmarks(text)]
        files = [text.partition("=")[2].strip("'\"") for text in overrides if text.startswith("data=")]
        names, doubled = set_names_of(files, chosen)
        problems += doubled
        # A set made by data=FILE comes first, so that its fields can be given in any order.
        for text in sorted(overrides, key=lambda text: not text.startswith("data=")):
            try:
                words += _translate(text, presets, purpose, names)
            except ConfigErrors as error:
                problems += error.problems
        try:
            plain = _plain(search + words)
        except _COMPOSING:
            if whole is not None:
                _check_whole(search, whole)
            plain = _plain(_sift(search, words, problems))
        if purpose is Purpose.eval and whole is None:
            entry = _trained_with(plain)
            _fill_sets(plain, [name for name in names.values() if name not in chosen], entry)
            _fill_endings(plain, overrides, entry)
        if purpose is not Purpose.eval and whole is None:
            _own_folder(plain, overrides)
        return plain, problems


def _made_presets() -> list[str]:
    """The benchmarks, whose presets are no files."""
    return [name for name, benchmark in BENCHMARKS.items() if not benchmark.training]


@cache
def _store_benchmarks() -> None:
    for name in _made_presets():
        ConfigStore.instance().store(group="benchmark", name=name, node=preset(name), package="_global_")


def _presets(folders: Sequence[Path], group: str) -> list[str]:
    """The names of a group's presets in these folders. Hydra's own search takes 0.1 s for each group."""
    files = {path.stem for folder in folders for path in (folder / group).glob("*.yaml") if path.is_file()}
    return sorted(files.union(_made_presets() if group == "benchmark" else []))


def _register_resolvers() -> None:
    """What presets may write.

    `${repo:PATH}`: a path in the repository. `${few_nodes:A,B}`: A if the run starts servers on its nodes, and these
    are one, as they are if nothing says how many, or two, each with a whole copy of the model: without a pipeline.
    `${colocated:A,B}`: A if rollout.placement is colocated, wherever that was set.
    """

    def few_nodes(yes: object, no: object, *, _root_: Any) -> object:
        nodes, away = (_value(_root_, f"cluster.{name}") for name in ("nodes", "rollout_nodes"))
        served = _value(_root_, "rollout.engine") in [kind.name for kind in EngineKind if kind.is_served]
        started = served and _value(_root_, "rollout.servers.addresses") is None
        whole = nodes in (None, 1) or (nodes == 2 and _value(_root_, "parallel.pipeline") in (None, 1))
        return yes if whole and not away and started else no

    def colocated(yes: object, no: object, *, _root_: Any) -> object:
        return yes if _value(_root_, "rollout.placement") == Placement.colocated.name else no

    OmegaConf.register_new_resolver("repo", lambda path: str(REPOSITORY / path), replace=True)
    OmegaConf.register_new_resolver("few_nodes", few_nodes, replace=True)
    OmegaConf.register_new_resolver("colocated", colocated, replace=True)


def _value(tree: Any, path: str) -> object:
    """A value of a tree that may be anything: what is wrong with it is reported later."""
    try:
        return OmegaConf.select(tree, path)
    except OmegaConfBaseException:
        return None


def _own_folder(plain: dict[str, Any], overrides: Sequence[str]) -> None:
    """Give an arm of a comparison, `algorithm=NAME`, a folder of its own next to the preset's: `run.dir` + `_NAME`.

    A run.dir on the command line stays as it is, and so does that of the default algorithm.
    """
    given = dict(text.lstrip("+").partition("=")[::2] for text in overrides)
    name, run = given.get("algorithm", _DEFAULT_ALGORITHM), plain.get("run")
    if name == _DEFAULT_ALGORITHM or not name.isidentifier() or "run.dir" in given or not isinstance(run, dict):
        return
    folder = run.get("dir")
    if isinstance(folder, str) and folder != MISSING:
        run["dir"] = f"{folder.rstrip('/')}_{name}"


def _trained_with(plain: dict[str, Any]) -> dict[str, Any]:
    """What the model was trained with, if its folder says so (`config.trained_with`)."""
    model = plain.get("model")
    path = model.get("path") if isinstance(model, dict) else None
    return read_trained_with(Path(path)) if isinstance(path, str) else {}


def _fill_endings(plain: dict[str, Any], overrides: Sequence[str], entry: dict[str, Any]) -> None:
    """Take the lengths and stop strings that the model was trained with, where no preset or override gives others."""
    rollout = plain.get("rollout")
    if not isinstance(rollout, dict):
        return
    for field, value in endings(entry).items():
        is_given = any(text.lstrip("+").startswith(f"rollout.{field}=") for text in overrides)
        if not is_given and rollout.get(field) == getattr(RolloutConfig(), field):
            rollout[field] = value


def _fill_sets(plain: dict[str, Any], names: Sequence[str], entry: dict[str, Any]) -> None:
    """Give the sets of data=FILE the fields that no override gave: as the model was trained, else the defaults."""
    evaluation = plain.get("evaluation")
    sets = evaluation.get("sets") if isinstance(evaluation, dict) else None
    if not isinstance(sets, dict):
        return
    for name in names:
        fields = sets.get(name)
        if not isinstance(fields, dict):
            continue
        defaults = {"answer_field": "answer", "verifier": Verifier.math.name}
        if offered := defaults_for(entry, str(fields.get("path"))):
            if {"verifier", "verifier_field"} & offered.keys():
                del defaults["verifier"]
            defaults |= offered
        if {"verifier", "verifier_field"} & fields.keys():
            defaults = {field: v for field, v in defaults.items() if field not in ("verifier", "verifier_field")}
        for field, value in defaults.items():
            fields.setdefault(field, value)


def _own_name() -> str:
    """The name of a folder that no other job has: the time, and what tells jobs of the same second apart."""
    job = os.getppid() if "RANK" in os.environ else os.getpid()  # the processes of a node have their launcher in common
    return f"{time.strftime('%Y%m%d-%H%M%S')}-{job}"


def _whole(file: str) -> dict[str, Any]:
    try:
        plain = read_json(Path(file), dict)
        OmegaConf.create(plain)
    except InputError as error:
        wrong = str(error).removeprefix(f"{file} ").partition("; ")[0]
        raise ConfigErrors([Problem("--config", file, wrong, "give a run's config.json, whole")]) from error
    except _COMPOSING as error:
        wrong = f"cannot be read ({_in_short(error)})"
        raise ConfigErrors([Problem("--config", file, wrong, "give a run's config.json")]) from error
    return plain


def attributed(problems: Sequence[Problem], whole: str | None) -> list[Problem]:
    """Problems of fields. Those of the file `whole` name the file: they were not set on the command line."""
    if whole is None:
        return list(problems)
    in_file = {(problem.field, show(problem.value)) for problem in read(without_default_settings(_whole(whole)))[1]}
    return [
        Problem("--config", whole, f"{problem.field}={show(problem.value)} in it: {problem.wrong}", _OF_FILE)
        if (problem.field, show(problem.value)) in in_file
        else problem
        for problem in problems
    ]


_OF_FILE = "use the version of the program that wrote the file, or correct the field in a copy"


def _in_short(error: BaseException) -> str:
    """The first three lines of an error."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return "; ".join(line if len(line) <= 300 else f"{line[:300]}..." for line in lines[:3])


def _check_whole(search: list[str], file: str) -> None:
    """Raises ConfigErrors if a whole configuration cannot be composed by itself."""
    try:
        _plain(search)
    except _COMPOSING as error:
        wrong = f"cannot be read as a configuration ({_in_short(error)})"
        raise ConfigErrors([Problem("--config", file, wrong, "give a run's config.json")]) from error


# ValueError and IndexError: OmegaConf's, for a position in a list that is none (evaluation.pass_k.x=1); ValueError also
# Python's, for a whole number of more than 4300 digits. OSError: a preset that cannot be read.
_COMPOSING = (HydraException, OmegaConfBaseException, YAMLError, ValueError, IndexError, RecursionError, OSError)


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
            fix = "correct it, or the file that it names"
            problems.append(Problem(key.lstrip("+"), value, _in_short(error), fix))
            return accepted
        if not words:  # the files of configs/ themselves
            raise
    middle = len(words) // 2
    return _sift(_sift(accepted, words[:middle], problems), words[middle:], problems)


def _benchmarks(text: str) -> list[str]:
    """The names in benchmark=NAME or benchmark=[NAME,NAME]."""
    key, _, value = text.partition("=")
    return re.findall(r"\w+", value) if key.lstrip("+") == "benchmark" else []


def _single_files(text: str) -> list[str]:
    """data=[FILE,FILE] as data=FILE for each; any other override as it is."""
    if not text.startswith("data=["):
        return [text]
    try:
        files = _parsed(text)[1].value()
    except ConfigErrors:  # it is reported later
        return [text]
    if not isinstance(files, list) or not files or not all(isinstance(file, str) for file in files):
        return [text]
    return [f"data={_quoted(file) if ',' in file or file[:1] in _OPENING else file}" for file in files]


def _quoted(value: str) -> str:
    """The text in the quotes of Hydra's grammar."""
    return '"' + re.sub(r'(\\*)("|$)', lambda match: 2 * match[1] + ("\\" + match[2] if match[2] else ""), value) + '"'


_OPENING = ("[", "{", "'", '"', "")  # how a value that is no plain text begins


def _parsed(text: str, meant: str | None = None) -> tuple[str, Override]:
    """An override, and its text as Hydra's grammar has it: a value that needs quotes gets them.

    So data=数学.jsonl and 'run.dir=runs/a (b)' are taken literally. `meant`: the fix of what cannot be read, if known.
    """
    key, equals, value = text.partition("=")
    tried = [text] if not equals or value[:1] in _OPENING else [text, f"{key}={_quoted(value)}"]
    for words in tried:
        try:
            return words, OverridesParser.create().parse_override(words)
        except (HydraException, ValueError, RecursionError):
            continue
    if key and not _KEY.fullmatch(key) and equals:
        fix = "a field is named with letters, digits, _ and dots, as in docs/configuration.md"
        raise _refused(text, "is no name of a field", fix)
    fix = meant or "write KEY=VALUE; quote a value with special characters: 'KEY=\"VALUE\"'"
    raise _refused(text, "cannot be read", fix)


def _meant(word: str, presets: Callable[[str], list[str]], purpose: Purpose) -> str | None:
    """The override that a word without `=` stands for; None if nothing suggests one."""
    if "=" in word:
        return None
    if word in presets("experiment"):
        return f"experiment={word}"
    if purpose is Purpose.eval and os.path.exists(word):  # unlike Path.exists, False for names that are too long
        key = "model" if os.path.isdir(word) else "data"
        return f"'{key}={_quoted(word)}'" if "," in word else f"{key}={word}"
    return None


_KEY = re.compile(r"[+~]{0,2}[A-Za-z_][\w@:/.-]*", re.ASCII)


def _translate(
    text: str, presets: Callable[[str], list[str]], purpose: Purpose, set_names: Mapping[str, str]
) -> list[str]:
    """A user's override in the form for Hydra. Raises ConfigErrors."""
    text, override = _parsed(text, _meant(text, presets, purpose))
    key = override.key_or_group
    if override.is_sweep_override():
        value = text.partition("=")[2]
        fix = f"give one value, a list as {key}=[{value}], or text with a comma in quotes: '{key}=\"{value}\"'"
        if key in GROUPS and key != "benchmark":
            fix = f"{key}=one of {value}"
            if purpose is Purpose.eval and key == "data":
                fix = f"'data={_quoted(value)}'" if os.path.exists(value) else f"data=[{value}]"
        raise _refused(text, "sweeps over several values are not supported", fix)
    if key.startswith("hydra"):
        raise _refused(text, "Hydra's own settings are not used", "for your own presets use --config-dir")
    if key in GROUPS and override.package is None:
        return _preset(override, text, presets(key), purpose, set_names)
    if override.is_delete():
        return [text]
    if group := meant_group(key):
        raise _refused(text, "there is no such group of presets", f"{group}={text.partition('=')[2]}")
    return ["++" + text.lstrip("+")]


def _preset(
    override: Override, text: str, names: list[str], purpose: Purpose, set_names: Mapping[str, str]
) -> list[str]:
    """A choice in a group of presets, or one of the short forms model=FOLDER and data=FILE."""
    group, choice, given = override.key_or_group, override.value(), text.partition("=")[2]
    if override.is_delete() or choice is None or choice in names:
        return [text.lstrip("+")]
    if group == "benchmark" and isinstance(choice, list):
        unknown = [str(name) for name in choice if name not in names]
        if not unknown:
            return [text.lstrip("+")]
        raise _refused(text, f"there is no benchmark {unknown[0]}", did_you_mean(unknown[0], names))
    if isinstance(choice, list | dict):
        raise _refused(text, *_of_one(group, choice, purpose))
    path = Path(str(choice))
    if group == "model" and (os.path.exists(path) or "/" in str(choice)):
        return [f"++model.path={given}"]
    if group == "data" and path.suffix in SUFFIXES:
        if purpose is not Purpose.eval:
            raise _refused(text, "is only for eval", f"data.labelled.path={given} or data.unlabelled.path={given}")
        return [f"++evaluation.sets.{set_names.get(str(choice), set_name(path))}.path={given}"]
    if purpose is Purpose.eval and group == "data" and path.suffix:
        fix = "convert it: megatron-tempo prepare custom FILE --out FILE.jsonl ..."
        raise _refused(text, f"must end in {' or '.join(SUFFIXES)}", fix)
    fix = did_you_mean(str(choice), names)
    if purpose is Purpose.eval and group in ("model", "data"):
        form = "an existing folder" if group == "model" else f"a file that ends in {' or '.join(SUFFIXES)}"
        raise _refused(text, "names neither a preset nor a file", f"{form}; of the presets: {fix}")
    raise _refused(text, f"there is no preset of this name in configs/{group}", fix)


def _of_one(group: str, choice: list[Any] | dict[Any, Any], purpose: Purpose) -> tuple[str, str]:
    """What is wrong with a list or a mapping where one name is expected, and the fix."""
    if purpose is Purpose.eval and group == "data" and isinstance(choice, dict) and choice:
        sets = " ".join(f"evaluation.sets.{name}.path={file}" for name, file in choice.items())
        return "is a mapping, not a file", sets
    is_file = purpose is Purpose.eval and group in ("model", "data")
    kind = "a list" if isinstance(choice, list) else "a mapping"
    first = next((one for one in choice if isinstance(one, str)), "NAME")
    return f"is {kind}, not one name{' or path' if is_file else ''}", f"{group}={first}"


def meant_group(key: str) -> str | None:
    """The group of presets that `key` names, perhaps misspelt."""
    close = [] if "." in key else get_close_matches(key, GROUPS, n=1)
    return close[0] if close else None


def _refused(text: str, wrong: str, fix: str) -> ConfigErrors:
    key, _, value = text.partition("=")
    return ConfigErrors([Problem(key.lstrip("+~"), value, wrong, fix)])
