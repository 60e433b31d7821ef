"""Rewards, advantages and other quantities of the methods, as pure functions of tensors. Losses are in `kernels`."""
