"""What a resumed run must find as it was, besides its training prompts."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_tempo.config import Config
from megatron_tempo.config.schema import DatasetConfig
from megatron_tempo.config.updates import KlReference
from megatron_tempo.data.sets import unchanged_files
from megatron_tempo.errors import InputError
from megatron_tempo.training.context import open_context
from megatron_tempo.training.inputs import check, fingerprints
from megatron_tempo.types import LabelledPrompt
from tests.support.ranks import run_ranks
from tests.support.tiny import write_model

PROMPTS = [LabelledPrompt(f"q:{i}", "Find it.", (1, i), str(i), "math") for i in range(2)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "model", tied=True, layers=1)


def of(model: Path, *, kl: float = 0.0) -> Config:
    config = Config()
    config.run.dir = str(model.parent / "run")
    config.model.path = str(model)
    config.stage2.actor.kl_coef, config.stage2.iterations = kl, 1
    return config


def test_an_evaluation_set_that_was_replaced_is_refused(model: Path) -> None:
    before = fingerprints(of(model), {"aime": PROMPTS, "gpqa": PROMPTS})
    check(before, before)
    for other in (PROMPTS[:1], PROMPTS[::-1], [replace(PROMPTS[0], answer="4"), PROMPTS[1]]):
        with pytest.raises(InputError) as caught:
            check(before, fingerprints(of(model), {"aime": other, "gpqa": PROMPTS}))
        text = str(caught.value)
        assert "evaluation.sets.aime: the file, its fields, the tokenizer or the chat template changed" in text
        assert "gpqa" not in text
        assert "bring the old ones back, or start a new run with another run.dir" in text


def test_sets_may_be_added_and_left_out(model: Path) -> None:
    one = fingerprints(of(model), {"aime": PROMPTS})
    two = fingerprints(of(model), {"aime": PROMPTS, "gpqa": PROMPTS[:1]})
    check(one, two)
    check(two, one)
    check({}, two)  # a checkpoint of an earlier version


def test_the_models_description_is_compared_by_what_it_says(model: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(model, tmp_path / "copy")
    before = fingerprints(of(model), {})
    content = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(content | {"transformers_version": "99"}, indent=7))
    check(before, fingerprints(of(copy), {}))
    (copy / "config.json").write_text(json.dumps(content | {"rms_norm_eps": 0.125}))
    with pytest.raises(InputError, match=r"model\.path: config\.json changed"):
        check(before, fingerprints(of(copy), {}))


def of_ranks(config: Config) -> dict[str, str]:
    with open_context(config):
        return fingerprints(config, {})


@pytest.mark.long
def test_weights_count_where_the_kl_term_reads_them(model: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(model, tmp_path / "copy")
    (file,) = copy.glob("*.safetensors")
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with_kl = run_ranks(of_ranks, 2, tmp_path / "a", of(model, kl=0.1))
    (alone,) = run_ranks(of_ranks, 1, tmp_path / "b", of(model, kl=0.1))
    assert with_kl == [alone, alone], "the same on every rank, and for any number of them"
    (other,) = run_ranks(of_ranks, 1, tmp_path / "c", of(copy, kl=0.1))
    with pytest.raises(InputError, match=r"model\.path: weights changed \(the KL term holds the policy to them\)"):
        check(alone, other)
    assert "model.path: weights" not in fingerprints(of(copy), {}), "without the term they are not read again"


@pytest.mark.parametrize(("first", "first_kl", "counts"), [(1, 0.0, False), (1, 0.1, True), (0, 0.0, True)])
def test_weights_do_not_count_if_the_kl_term_is_to_the_start_of_stage_two(
    model: Path, tmp_path: Path, first: int, first_kl: float, counts: bool
) -> None:
    """Unless stage 1 has a term too, or is not part of the run, so that the start of stage 2 is `model.path`."""
    config = of(model, kl=0.1)
    config.stage2.actor.kl_reference = KlReference.start
    config.stage1.iterations, config.stage1.actor.kl_coef = first, first_kl
    (found,) = run_ranks(of_ranks, 1, tmp_path, config)
    assert ("model.path: weights" in found) == counts


def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path: Path) -> None:
    config, path = Config(), tmp_path / "aime.jsonl"
    config.evaluation.sets = {"aime": DatasetConfig(path=str(path)), "own": DatasetConfig(path=str(tmp_path))}
    path.write_text("first")
    with unchanged_files(config) as digests:
        pass
    path.write_text("second")
    assert digests["aime"] == "a7937b64b8caa58f03721bb6bacf5c78cb235febe0e70b1b84cd99541461a08e"
    assert digests["own"] is None
    words = r"aime\.jsonl \(evaluation\.sets\.aime\) changed while it was read"
    with pytest.raises(InputError, match=words), unchanged_files(config):
        path.write_text("third")
