"""The kinds of cases: which good inputs are written, what is damaged, and which commands get it."""

from __future__ import annotations

import json
import os
import random
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_tempo import cli
from megatron_tempo.checkpoint import manifest
from megatron_tempo.config import resume
from megatron_tempo.config.rules import Purpose
from megatron_tempo.config.shipped import REPOSITORY
from megatron_tempo.config.tree import field_paths
from tests.fuzz.inputs import ROWS, whole_config, write_evaluation, write_lines, write_run, write_table
from tests.fuzz.judge import Case, Command, only
from tests.fuzz.mutations import SHAPES, Mutator
from tests.unit.config_files import good_overrides, write_all

FIELDS = tuple(field_paths())
PLANNED = ("experiment=qwen3_8b_aime", "cluster=h100x8")
_UNSET = "has no value"  # of a field that a preset leaves to the user, which `check` says of each
_PRESETS = ("experiment", "model", "data", "engine", "algorithm", "cluster", "benchmark")


def command(*words: str, statuses: tuple[int, ...] = (0, 2), may_write: tuple[str, ...] = ()) -> Command:
    """A command line of megatron-tempo."""
    return Command(f"megatron-tempo {shlex.join(words)}", lambda: cli.main(list(words)), statuses, may_write)


def configured(words: list[str], rng: random.Random) -> list[Command]:
    """A command that builds a configuration from these words."""
    name = rng.choice(("check", "check", "plan", "submit", "eval"))
    if name == "check":
        return [command("check", *words)]
    if name == "plan":
        return [command("plan", *words, statuses=(0, 1, 2))]
    if name == "submit":
        return [command("submit", "--dry-run", *words)]

    def build() -> object:
        whole = words[words.index("--config") + 1] if "--config" in words else None
        plain = [word for word in words if not word.startswith("--config") and word != whole]
        return cli.build(plain, purpose=Purpose.eval, whole=whole)

    return [Command(f"(the configuration of) eval {shlex.join(words)}", lambda: only((), build))]


def overrides(folder: Path, mutator: Mutator) -> Case:
    """KEY=VALUE on the command line."""
    rng = mutator.rng
    write_all(folder)
    words = list(PLANNED) if rng.random() < 0.4 else good_overrides(folder)
    names = ["KEY=VALUE", "override", "cluster", _UNSET]
    for _ in range(rng.choice((1, 1, 2, 4))):
        how = rng.randrange(8)
        if how == 0 and words:
            at = rng.randrange(len(words))
            names += _names_of(words.pop(at))
            continue
        if how == 1 and words:
            at = rng.randrange(len(words))
            key, _, _ = words[at].partition("=")
            words[at] = f"{key}={_argument(mutator)}"
        elif how == 2:
            words.append(f"{rng.choice(_PRESETS)}={_argument(mutator)}")
        elif how == 3:
            key = rng.choice(("~", "+", "++", "")) + rng.choice(FIELDS)
            words.append(rng.choice((key, f"{key}.{_argument(mutator)}={_argument(mutator)}", f"{key}@x=1")))
        elif how == 4:
            words.append(_argument(mutator).lstrip("-"))
        else:
            words.append(f"{rng.choice(FIELDS)}={_argument(mutator)}")
        names += _names_of(words[-1] if how != 1 else words[at])
    mutator.done.append("overrides")
    return Case(configured(words, rng), names, mutator.done)


def _argument(mutator: Mutator) -> str:
    """A value as a user writes it: quoted, as JSON, or as it comes."""
    value: Any = mutator.value()
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    text = text.replace("\ud83d", "\udcff").replace("\0", "")  # what a shell can hand over
    return json.dumps(text, ensure_ascii=False) if mutator.rng.random() < 0.2 else text


def _names_of(word: str) -> list[str]:
    """The names by which a message can refer to an override: its field, and the groups that the field is in."""
    key = word.partition("=")[0].lstrip("+~")
    parts = key.split(".")
    return [word[:40], *(part for part in (parts[-1][:40], parts[0][:40]) if part)]


def config_file(folder: Path, mutator: Mutator) -> Case:
    """A whole configuration, --config FILE."""
    write_all(folder)
    plain = whole_config(folder)
    if mutator.rng.random() < 0.5:
        speeds = {"bf16_tflops": 989, "memory_tbs": 3.35, "nvlink_gbs": 450, "network_gbs": 50}
        plain["cluster"] = {"gpu": "H100", "memory_gb": 80, "nodes": 2, "gpus_per_node": 8} | speeds
    path, names = folder / "given.json", ["given.json", "cluster=null"]
    for _ in range(mutator.rng.choice((0, 1, 1, 2))):
        plain = mutator.json(plain)
    path.write_text(json.dumps(plain), encoding="utf-8")
    if not mutator.done:
        mutator.file(path)
    names += [name for field in mutator.fields for name in _names_of(field)]
    return Case(configured(["--config", str(path)], mutator.rng), names, mutator.done)


def presets(folder: Path, mutator: Mutator) -> Case:
    """A user's own presets, --config-dir DIR."""
    group = mutator.rng.choice(("cluster", "cluster", "model", "experiment", "engine"))
    own = folder / "own" / group
    own.mkdir(parents=True)
    source = mutator.rng.choice(sorted((REPOSITORY / "configs" / group).glob("*.yaml")))
    path = own / "mine.yaml"
    lines = source.read_text(encoding="utf-8").splitlines()
    for _ in range(mutator.rng.choice((0, 1, 2))):
        at = mutator.rng.randrange(len(lines))
        lines[at] = f"{lines[at].partition(':')[0]}: {_argument(mutator)}"
        mutator.done.append(f"line {at + 1}: {lines[at]:.80}")
    path.write_text("\n".join(lines).encode("utf-8", "replace").decode() + "\n", encoding="utf-8")
    if not mutator.done:
        mutator.file(path) if mutator.rng.random() < 0.8 else mutator.place(own)
    names = ["mine", "own", _UNSET, *(line.partition(":")[0].strip() for line in lines if ":" in line)]
    words = ["experiment=qwen3_8b_aime", "cluster=h100x8", f"{group}=mine", "--config-dir", str(folder / "own")]
    listing = command("presets", "--config-dir", str(folder / "own"))
    planned = command("plan", *words, statuses=(0, 1, 2))
    return Case([listing, mutator.rng.choice((planned, command("check", *words)))], names, mutator.done)


def data(folder: Path, mutator: Mutator) -> Case:
    """Files of questions, of a configuration."""
    write_all(folder)
    rng = mutator.rng
    name = rng.choice(("labelled", "unlabelled", "heldout"))
    words = good_overrides(folder)
    if rng.random() < 0.3:
        path = write_table(folder / "own.parquet")
        field = "evaluation.sets.heldout" if name == "heldout" else f"data.{name}"
        words.append(f"{field}.path={path}")
    else:
        path = write_lines(folder / f"{name}.jsonl", ROWS)
    for _ in range(rng.choice((1, 1, 2))):
        if os.path.isfile(path):
            mutator.file(path)
    names = [path.name, f"data.{name}", f"evaluation.sets.{name}"]
    return Case([command("check", *words)], names, mutator.done)


def prepare(folder: Path, mutator: Mutator) -> Case:
    """Files of questions, for prepare."""
    rng = mutator.rng
    path = write_table(folder / f"own{rng.choice(('.json', '.jsonl', '.csv', '.parquet', '.arrow'))}")
    source = path
    if rng.random() < 0.2:
        source = folder / "set"
        source.mkdir()
        path = path.rename(source / path.name)
    for _ in range(rng.choice((1, 1, 2))):
        if os.path.isfile(path):
            mutator.file(path)
    verifier = rng.choice(("text", "text", "text", "text", "text", "text", "choice", "math"))
    words = ["prepare", "custom", str(source), "--out", str(folder / "out.jsonl")]
    words += ["--prompt-field", "prompt", "--answer-field", "answer", "--verifier", verifier]
    if rng.random() < 0.3:
        words += ["--split-heldout", rng.choice(("1", "-1", "3", "9" * 309, "x"))]
    if rng.random() < 0.2:
        words[1] = rng.choice(("math500", "gpqa_diamond", "gsm8k", "aime2025"))
        del words[5:9]
    written = [f"{name}{end}" for name in ("out.jsonl", "out_heldout.jsonl") for end in ("", ".lock")]
    names = [path.name, path.stem, source.name, "--split-heldout", "SET"]
    return Case([command(*words, may_write=tuple(written))], names, mutator.done)


def run(folder: Path, mutator: Mutator) -> Case:
    """The folder of a training run."""
    rng = mutator.rng
    write_all(folder)
    path = write_run(folder / "run", whole_config(folder))
    files = sorted(file for file in path.rglob("*") if os.path.isfile(file) and file.name != "weights.distcp")
    names = ["run.dir"]
    for _ in range(rng.choice((1, 1, 2))):
        file = rng.choice(files)
        if os.path.isfile(file) and not file.is_symlink():
            mutator.file(file)
        names.append(file.name)
    if rng.random() < 0.1:
        other = rng.choice((path / "checkpoints", path / "checkpoints" / "step_00000003", path))
        mutator.place(other)
        names += [other.name, *(file.name for file in files)]
    commands = [
        command("status", str(path), statuses=(0, 1, 2)),
        command("report", str(path), may_write=("run/report.html",)),
        command("check", *good_overrides(folder)),
    ]
    return Case([*commands, *_readers(path / "checkpoints" / "step_00000003")], names, mutator.done)


def _readers(checkpoint: Path) -> list[Command]:
    """What a start does with a checkpoint before it needs torch."""
    read = "manifest of run.dir/step_00000003"

    def damage() -> None:
        resume.step_folders(checkpoint.parent)
        manifest.damage(checkpoint, "actor")

    def state() -> int:
        only((OSError, ValueError), lambda: manifest.read_state(checkpoint))
        return 0  # who calls it names the checkpoint

    return [
        Command(f"{read}: damage", lambda: only((OSError,), damage)),
        Command(f"{read}: read_state", state),
    ]


def evaluations(folder: Path, mutator: Mutator) -> Case:
    """Two folders of the eval command, compared."""
    first, second = write_evaluation(folder / "first"), write_evaluation(folder / "second")
    names = ["first", "second"]
    for _ in range(mutator.rng.choice((1, 1, 2))):
        file = mutator.rng.choice(sorted(second.iterdir()))
        if os.path.isfile(file) and not file.is_symlink():
            mutator.file(file)
        names.append(file.name)
    page = str(folder / "both.html")
    commands = [
        command("compare", str(first), str(second)),
        command("report", str(first), str(second), "--out", page, may_write=("both.html",)),
        command("status", str(second), statuses=(0, 1, 2)),
        command("report", str(second), may_write=("second/report.html",)),
    ]
    return Case(commands, names, mutator.done)


def model(folder: Path, mutator: Mutator) -> Case:
    """The folder of a model."""
    rng = mutator.rng
    write_all(folder)
    path = folder / "model"
    (path / "generation_config.json").write_text('{"eos_token_id": [7, 9], "temperature": 0.6}')
    (path / "tokenizer.json").write_text(json.dumps(_TOKENIZER), encoding="utf-8")
    if rng.random() < 0.3:
        weights = {"model.norm.weight": "model.safetensors"}
        (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weights}))
    names = ["model"]
    for _ in range(rng.choice((1, 1, 2))):
        file = rng.choice(sorted(path.iterdir()))
        if file.suffix == ".safetensors" and os.path.isfile(file) and rng.random() < 0.5:
            _damage_header(file, mutator)
        elif os.path.isfile(file) and not file.is_symlink():
            mutator.file(file)
        names.append(file.name)
    if rng.random() < 0.05:
        mutator.place(path)
    words = [*good_overrides(folder), "cluster=h100x8"] if rng.random() < 0.4 else good_overrides(folder)
    return Case(configured(words, rng), [*names, "cluster"], mutator.done)


_TOKENIZER: dict[str, Any] = {
    "version": "1.0",
    "added_tokens": [{"id": 7, "content": "<end>", "special": True, "normalized": False}],
    "model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": ["a b"]},
}


def _damage_header(path: Path, mutator: Mutator) -> None:
    """Damage the JSON header of a safetensors file; its length is right, or not."""
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    try:
        given = json.loads(content[8 : 8 + size])
    except ValueError:  # the file is damaged already
        given = None
    if given is None or mutator.rng.random() < 0.3:
        header = mutator.rng.choice(SHAPES).encode()
        mutator.done.append(f"header: {header!r:.60}")
    else:
        header = json.dumps(mutator.json(given)).encode()
    length = mutator.rng.choice((len(header), len(header), len(header), 0, 1 << 40, (1 << 64) - 1, size))
    path.write_bytes(length.to_bytes(8, "little") + header + content[8 + size :])
    mutator.done.append(f"header of {length} bytes")


KINDS: dict[str, Callable[[Path, Mutator], Case]] = {
    kind.__name__: kind for kind in (overrides, config_file, presets, data, prepare, run, evaluations, model)
}


def maker(kind: str, seed: int) -> Callable[[Path], Case]:
    """Makes the case of this kind and seed in a folder."""
    return lambda folder: KINDS[kind](folder, Mutator(random.Random(f"{kind} {seed}")))
