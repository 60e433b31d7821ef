"""NCCL's settings that all members of a group must have in common: the trainer's ranks and the servers' workers.

SGLang 0.5.23 sets both variables to 0 in its own processes, unless its environment has them
(`srt/entrypoints/engine.py`, `_set_envs_and_config`). vLLM 0.32.0 sets neither. Without this module the trainer's ranks
would have NCCL's default, cuMem, and could be in a group with workers that cannot open such memory.
"""

from __future__ import annotations

import os
from collections.abc import MutableMapping

# Multicast (NVLS) needs cuMem.
SETTINGS = {"NCCL_CUMEM_ENABLE": "0", "NCCL_NVLS_ENABLE": "0"}


def align_nccl(environment: MutableMapping[str, str] = os.environ) -> None:
    """Give an environment the common settings. A value that the user has set stays, and started servers inherit it.

    NCCL reads them when a process opens its first communicator.
    """
    for name, value in SETTINGS.items():
        environment.setdefault(name, value)
