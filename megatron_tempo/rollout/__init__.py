"""Rollouts: engines that generate, and what becomes of their completions."""
