"""Weights between Megatron's shards and Hugging Face's names, both ways, as a stream."""
