"""Checks on a published model with its own tokenizer; `make real-model` fetches it (docs/real_model.md)."""
