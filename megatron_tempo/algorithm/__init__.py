"""Advantages and losses: pure functions of tensors, on jagged rows."""
