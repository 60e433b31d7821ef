"""For a name that Megatron-Core imports."""
