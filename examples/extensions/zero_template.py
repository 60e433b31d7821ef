"""A prompt template: the conversation as DeepSeek-R1-Zero has it, for base models (arXiv 2501.12948, Table 1).

    data.labelled.chat_template=import:zero_template:template

It replaces the tokenizer's chat template. Give the same template to every set of questions: a model is to be
evaluated on prompts of the form that it is trained on.
"""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

SYSTEM = (
    "A conversation between User and Assistant. The User asks a question, and the Assistant solves it. The Assistant "
    "first thinks about the reasoning process in the mind and then provides the User with the answer."
)
SPEAKERS = {"user": "User", "assistant": "Assistant"}


def template(messages: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase) -> str:
    """The text that the model reads, special tokens included: none are added to it.

    `messages` are {"role": ..., "content": ...}, the last one the user's. A text prompt comes as one message, with the
    `suffix` of its set; `system`, if it is set, comes first. A ValueError rejects the question, with its message.
    """
    system, turns = SYSTEM, messages
    if messages[0]["role"] == "system":
        system, turns = messages[0]["content"], messages[1:]
    if any(message["role"] not in SPEAKERS for message in turns):
        raise ValueError("a system message must come first")
    lines = [f"{SPEAKERS[message['role']]}: {message['content']}" for message in turns]
    return "\n".join([f"{tokenizer.bos_token or ''}{system}", *lines, "Assistant: <think>"])
