"""Converts weights between Megatron's shards and Hugging Face tensors, in both directions, as a stream."""
