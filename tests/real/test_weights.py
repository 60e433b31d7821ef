"""The published weights: both converters, and Megatron's network against transformers'."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, safe_open

from megatron_tempo.checkpoint.convert import to_hugging_face, to_megatron
from megatron_tempo.config.choices import Layers
from megatron_tempo.config.schema import Config, DatasetConfig
from megatron_tempo.data.dataset import load_unlabelled
from megatron_tempo.data.tokenizer import load_tokenizer
from megatron_tempo.training.context import open_context
from megatron_tempo.training.setup import build_actor
from megatron_tempo.types import Batch
from megatron_tempo.weights.export import export_hf
from megatron_tempo.weights.folder import carried
from tests.distributed.test_parity import gather_logits
from tests.support.ranks import run_ranks
from tests.support.tiny import one_version

pytestmark = pytest.mark.real
QUESTIONS = Path(__file__).parents[2] / "build" / "real-model" / "questions" / "heldout.jsonl"
ANSWERS = ("The sum is 115.<|im_end|>", "84<|im_end|>", "Let me see.\n\n12 + 7 = 19<|endoftext|>")


def batch_of(model: Path) -> Batch:
    """Questions by the chat template, each with an answer."""
    tokenizer = load_tokenizer(model)
    prompts = load_unlabelled(DatasetConfig(path=str(QUESTIONS), limit=len(ANSWERS)), tokenizer, 64)
    responses = [tokenizer(text).input_ids for text in ANSWERS]
    lengths = torch.tensor([len(response) for response in responses])
    total = int(lengths.sum())
    return Batch(
        prompt_ids=tuple(prompt.id for prompt in prompts),
        group=torch.arange(len(prompts)),
        prompt_tokens=torch.tensor([token for prompt in prompts for token in prompt.token_ids]).int(),
        prompt_lengths=torch.tensor([len(prompt.token_ids) for prompt in prompts]),
        response_tokens=torch.tensor([token for response in responses for token in response]).int(),
        response_lengths=lengths,
        engine_logprobs=torch.zeros(total),
        stopped=torch.ones(len(ANSWERS), dtype=torch.bool),
        versions=one_version(lengths),
    )


def measured(model: Path, tensor: int, out: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """This tensor rank's logits of every token, and the log-probabilities of the answers. Also writes an export."""
    config = Config()
    config.model.path, config.model.layers, config.parallel.tensor = str(model), Layers.local, tensor
    with open_context(config) as context:
        actor = build_actor(context)
        export_hf(config, actor, None, out)
        batch = batch_of(model)
        with pytest.MonkeyPatch.context() as monkeypatch:
            logits = gather_logits(actor, batch, monkeypatch)
        assert logits is not None
        return logits, actor.logprobs(batch)


def reference(model: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """The same by transformers, over the whole vocabulary."""
    opened = transformers.AutoModelForCausalLM.from_pretrained(model, dtype="float32", attn_implementation="eager")
    batch, logits, logprobs = batch_of(model), [], []
    with torch.no_grad():
        for prompt, response in zip(batch.prompts(), batch.responses(), strict=True):
            row = opened(torch.cat([prompt, response])[None]).logits[0]
            logits.append(row)
            logprobs.append(row.log_softmax(-1)[len(prompt) - 1 : -1].gather(1, response[:, None].long())[:, 0])
    return torch.cat(logits), torch.cat(logprobs)


@pytest.mark.parametrize("tensor", [1, 3])
def test_logits_and_export_agree_with_transformers(model: Path, tmp_path: Path, tensor: int) -> None:
    """Three tensor ranks: as many as the model has key and value heads."""
    logits, logprobs = reference(model)
    ranks = run_ranks(measured, tensor, tmp_path / "ranks", model, tensor, tmp_path / "export")
    ours = torch.cat([of_rank for of_rank, _ in ranks], dim=1)
    torch.testing.assert_close(ours, logits, atol=1e-4 * float(logits.abs().max()), rtol=0)
    for _, of_answers in ranks:
        torch.testing.assert_close(of_answers, logprobs, atol=1e-4 * float(logprobs.abs().max()), rtol=0)
    assert_same(model, tmp_path / "export" / "actor")


def assert_same(model: Path, folder: Path) -> None:
    """All tensors to the bit, and the files that go with them."""
    given = load_file(model / "model.safetensors")
    names: set[str] = set()
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118, no dict
                assert torch.equal(opened.get_tensor(name), given[name]), name
                names.add(name)
    assert names == set(given) - {"lm_head.weight"}
    assert set(carried(model)) >= {
        "tokenizer.json",
        "tokenizer_config.json",
        "generation_config.json",
        "chat_template.jinja",
    }
    for name in carried(model):
        assert (folder / name).read_bytes() == (model / name).read_bytes()


def test_both_converters_keep_every_bit(model: Path, tmp_path: Path) -> None:
    to_megatron(model, tmp_path / "megatron", "actor", 64 << 20)
    to_hugging_face(tmp_path / "megatron", tmp_path / "back", "actor", model, None, 64 << 20)
    assert_same(model, tmp_path / "back")
