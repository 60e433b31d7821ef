"""TEMPO (arXiv 2604.19295), test-time training of reasoning models by EM, on Megatron-Core."""
