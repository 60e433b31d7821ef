"""Hydra composes the YAML files and the overrides; everything after it is the typed configuration.

Hydra gets the tree as plain data and accepts every field, so that `config.tree.read` reports all unknown fields and
wrong types at once, wherever they are.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from functools import cache
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
from megatron_tempo.config.choices import Verifier
from megatron_tempo.config.problem import ConfigErrors, Problem, did_you_mean
from megatron_tempo.config.rules import Purpose
from megatron_tempo.config.rules.data import SUFFIXES
from megatron_tempo.config.rules.evaluation import SET_NAME_BYTES
from megatron_tempo.config.rules.files import wrong_with_folder
from megatron_tempo.config.schema import Config, to_plain
from megatron_tempo.config.shipped import REPOSITORY
from megatron_tempo.config.tree import without_default_settings

GROUPS = ("model", "data", "benchmark", "engine", "algorithm", "experiment", "cluster")
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
    store = ConfigStore.instance()
    store.store(name="defaults", node=without_default_settings(to_plain(Config()) if whole is None else _whole(whole)))
    for name in (name for name, benchmark in BENCHMARKS.items() if not benchmark.training):
        store.store(group="benchmark", name=name, node=preset(name), package="_global_")
    OmegaConf.register_new_resolver("repo", lambda path: str(REPOSITORY / path), replace=True)
    search = [] if config_dir is None else [f"hydra.searchpath=['file://{Path(config_dir).resolve()}']"]
    with initialize_config_dir(str(folder), version_base="1.3"):
        loader = GlobalHydra.instance().config_loader()
        # Hydra searches its sources anew for each group: 0.1 s each, so only the groups that are named.
        presets = cache(lambda group: loader.get_group_options(group, overrides=search))
        # By default, an eval gets a folder of its own. Only one process writes, so it does not matter if the clocks of
        # several differ.
        folders = {Purpose.eval: EVAL_DIR, Purpose.convert: CONVERT_DIR}
        folder_of = folders.get(purpose) if whole is None else None
        words = [] if folder_of is None else [f"++run.dir={folder_of}/{_own_name()}"]
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
            if whole is not None:
                _check_whole(search, whole)
            return _plain(_sift(search, words, problems)), problems


def _own_name() -> str:
    """The name of a folder that no other job has: the time, and what tells jobs of the same second apart."""
    job = os.getppid() if "RANK" in os.environ else os.getpid()  # the processes of a node have their launcher in common
    return f"{time.strftime('%Y%m%d-%H%M%S')}-{job}"


def _whole(file: str) -> dict[str, Any]:
    try:
        plain = json.loads(Path(file).read_text(encoding="utf-8"))
        OmegaConf.create(plain if isinstance(plain, dict) else {})
    except _COMPOSING as error:
        wrong = f"cannot be read ({_in_short(error)})"
        raise ConfigErrors([Problem("--config", file, wrong, "give a run's config.json")]) from error
    if not isinstance(plain, dict):
        raise ConfigErrors([Problem("--config", file, "is not a JSON object", "give a run's config.json")])
    return plain


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


def _parsed(text: str) -> tuple[str, Override]:
    """An override, and its text as Hydra's grammar has it: a value that needs quotes gets them.

    So data=数学.jsonl and 'run.dir=runs/a (b)' are what they look like.
    """
    key, equals, value = text.partition("=")
    quoted = re.sub(r'(\\*)("|$)', lambda found: 2 * found[1] + ("\\" + found[2] if found[2] else ""), value)
    tried = [text] if not value or value[0] in "[{'\"" or not equals else [text, f'{key}="{quoted}"']
    for words in tried:
        try:
            return words, OverridesParser.create().parse_override(words)
        except (HydraException, ValueError, RecursionError):
            continue
    if key and not _KEY.fullmatch(key) and equals:
        fix = "a field is named with letters, digits, _ and dots, as in docs/configuration.md"
        raise _refused(text, "is no name of a field", fix)
    raise _refused(text, "cannot be read", "write KEY=VALUE; quote a value with special characters: 'KEY=\"VALUE\"'")


_KEY = re.compile(r"[+~]{0,2}[A-Za-z_][\w@:/.-]*", re.ASCII)


def _translate(text: str, presets: Callable[[str], list[str]], purpose: Purpose, benchmarks: list[str]) -> list[str]:
    """One override of the user as Hydra is to see it. Raises ConfigErrors."""
    text, override = _parsed(text)
    key = override.key_or_group
    if override.is_sweep_override():
        value = text.partition("=")[2]
        fix = f"give one value, a list as {key}=[{value}], or text with a comma in quotes: '{key}=\"{value}\"'"
        raise _refused(text, "sweeps over several values are not supported", fix)
    if key.startswith("hydra"):
        raise _refused(text, "Hydra's own settings are not used", "for your own presets use --config-dir")
    if key in GROUPS and override.package is None:
        return _preset(override, text, presets(key), purpose, benchmarks)
    if override.is_delete():
        return [text]
    if group := meant_group(key):
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
    if group == "model" and (os.path.exists(path) or "/" in str(choice)):
        return [f"++model.path={given}"]
    if group == "data" and path.suffix in SUFFIXES:
        if purpose is not Purpose.eval:
            raise _refused(text, "is only for eval", f"data.labelled.path={given} or data.unlabelled.path={given}")
        name = set_name(path)
        fields = {"path": given}
        if name not in benchmarks:
            fields |= {"answer_field": "answer", "verifier": Verifier.math.name}
        return [f"++evaluation.sets.{name}.{field}={value}" for field, value in fields.items()]
    if purpose is Purpose.eval and group == "data" and path.suffix:
        fix = "convert it: megatron-tempo prepare custom FILE --out FILE.jsonl ..."
        raise _refused(text, f"must end in {' or '.join(SUFFIXES)}", fix)
    fix = did_you_mean(str(choice), names)
    if purpose is Purpose.eval and group in ("model", "data"):
        form = "an existing folder" if group == "model" else f"a file that ends in {' or '.join(SUFFIXES)}"
        raise _refused(text, "names neither a preset nor a file", f"{form}; of the presets: {fix}")
    raise _refused(text, f"there is no preset of this name in configs/{group}", fix)


def set_name(path: Path) -> str:
    """The name of the evaluation set that data=FILE adds: one that an override can contain.

    >>> [set_name(Path(name)) for name in ("gsm8k-test.jsonl", "24game.jsonl", "数学.jsonl")]
    ['gsm8k_test', 'set_24game', 'set_872c1f']
    """
    name = re.sub(r"\W", "_", path.stem, flags=re.ASCII)
    digest = hashlib.sha256(path.stem.encode(errors="surrogateescape")).hexdigest()[:6]
    if not re.search(r"[A-Za-z0-9]", name):
        return f"set_{digest}"
    name = name if re.match(r"[A-Za-z_]", name) else f"set_{name}"
    return name if len(name) <= SET_NAME_BYTES else f"{name[: SET_NAME_BYTES - 7]}_{digest}"


def meant_group(key: str) -> str | None:
    """The group of presets that `key` names, perhaps misspelt."""
    close = [] if "." in key else get_close_matches(key, GROUPS, n=1)
    return close[0] if close else None


def _refused(text: str, wrong: str, fix: str) -> ConfigErrors:
    key, _, value = text.partition("=")
    return ConfigErrors([Problem(key.lstrip("+~"), value, wrong, fix)])
