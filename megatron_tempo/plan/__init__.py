"""Planner: predicts memory per GPU and time by phase, and finds the layouts that fit. Nothing is run.

It imports neither torch nor Megatron, so `megatron-tempo plan` answers on a login node in about a second. Memory is in
bytes; a GB is 10^9 bytes.
"""
