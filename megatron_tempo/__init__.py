"""TEMPO (arXiv 2604.19295), test-time training of reasoning models by EM, on Megatron-Core."""

__version__ = "0.1.0"  # pyproject.toml reads it
