"""TRL's GRPO: python -m trl_parts.trl_grpo WORK MODEL PROMPTS FOLDER, in an environment with TRL."""

from __future__ import annotations

import json
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from trl_parts.work import WORKS, Turns, Work, reward


class _Iterations(TrainerCallback):
    """An iteration is as many optimizer steps as share a generation."""

    def __init__(self, work: Work, turns: Turns) -> None:
        self.work, self.turns, self.tokens = work, turns, 0

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step % self.work.steps == 0:
            self.turns.wait()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step % self.work.steps == 0:
            self.turns.done(self.tokens)


def settings(work: Work, folder: str) -> GRPOConfig:
    """The same arithmetic as ours: fp32, no KL term, one epoch, each token weighted within its response."""
    return GRPOConfig(
        output_dir=folder,
        per_device_train_batch_size=work.mini_batch * work.samples,
        gradient_accumulation_steps=1,
        steps_per_generation=work.steps,
        num_generations=work.samples,
        max_completion_length=work.response_tokens,
        temperature=1.0,
        learning_rate=work.lr,
        lr_scheduler_type="constant",
        loss_type="grpo",
        beta=0.0,
        max_steps=10**6,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,  # TRL's default would compute every layer twice
        save_strategy="no",
        report_to=[],
        logging_steps=work.steps,
        disable_tqdm=True,
        seed=0,
    )


def main() -> None:
    name, model, prompts, folder = sys.argv[1:5]
    torch.set_num_threads(1)
    turns, work = Turns(), WORKS[name]
    rows = [json.loads(line) for line in Path(prompts).read_text(encoding="utf-8").splitlines()]

    def rewards(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
        return [reward(prompt, response, "") for prompt, response in zip(prompts, completions, strict=True)]

    iterations = _Iterations(work, turns)
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=rewards,
        args=settings(work, folder),
        train_dataset=Dataset.from_list([{"prompt": row["prompt"]} for row in rows]),
        callbacks=[iterations],
    )
    generate, logprobs = trainer._generate_single_turn, trainer._get_per_token_logps_and_entropies
    rollouts = trainer._generate_and_score_completions

    def timed_generate(*args: Any, **kwargs: Any) -> Any:
        with turns.phase("generate"):
            return generate(*args, **kwargs)

    def timed_logprobs(*args: Any, **kwargs: Any) -> Any:
        with nullcontext() if torch.is_grad_enabled() else turns.phase("logprobs"):
            return logprobs(*args, **kwargs)

    def counted(inputs: Any) -> Any:
        output = rollouts(inputs)
        iterations.tokens = int(output["completion_mask"].sum())
        return output

    trainer._generate_single_turn, trainer._get_per_token_logps_and_entropies = timed_generate, timed_logprobs
    trainer._generate_and_score_completions = counted
    trainer.train()


if __name__ == "__main__":
    main()
