"""The configuration tree and its rules. Nothing here imports torch."""

from megatron_tempo.config.problem import ConfigErrors, Problem
from megatron_tempo.config.rules import Purpose, check
from megatron_tempo.config.schema import Config
from megatron_tempo.config.tree import load, save

__all__ = ["Config", "ConfigErrors", "Problem", "Purpose", "check", "load", "save"]
