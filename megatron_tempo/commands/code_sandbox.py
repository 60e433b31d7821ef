"""What `check` says about the sandbox of programs on this machine."""

from __future__ import annotations

from megatron_tempo.config.rules.rewards import runs_programs
from megatron_tempo.config.schema import Config


def findings(config: Config) -> list[str]:
    """Lines on the sandbox, none if no set has programs for answers. Raises InputError if no sandbox works here."""
    if not runs_programs(config):
        return []
    from megatron_tempo.rewards.code_run import first_working

    sandbox, why = first_working(config.rewards.code.sandbox, config.rewards.code.python)
    gaps = "; ".join(sandbox.gaps)
    warnings = [f"warning: programs do not run in {line}" for line in why]
    return [*warnings, f"programs run in the sandbox {sandbox.name}, which does not protect from: {gaps}"]
