"""The versions of SGLang and vLLM that the adapters are written for, and what is said of a server of another one."""

from __future__ import annotations

import functools
import json
import logging
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass

log = logging.getLogger(__name__)

_SECONDS = 60.0  # for Python to start, on a busy machine
# Reads the metadata of packages: importing an engine takes half a minute.
_INSTALLED = """
import sys
from importlib.metadata import PackageNotFoundError, version
for name in sys.argv[1:]:
    try:
        print(version(name))
        break
    except PackageNotFoundError:
        pass
else:
    print("none")
"""


@dataclass(frozen=True, slots=True)
class EngineVersions:
    """`packages`: the names that the engine is installed under. `supported`: versions, or their first numbers."""

    engine: str
    packages: tuple[str, ...]
    supported: tuple[str, ...]
    installs: str  # the version that the images and the tests have

    def supports(self, version: str) -> bool:
        """Whether `version` begins with the numbers of a supported one: 0.32.1 with 0.32, and 0.5.23.post1 with 0.5.23.

        >>> EngineVersions("vLLM", ("vllm",), ("0.32",), "0.32.0").supports("0.320.0")
        False
        """
        return any(version == one or version.startswith((f"{one}.", f"{one}+", f"{one}rc")) for one in self.supported)

    def doubt(self, version: str, pip: str = "pip") -> str | None:
        """What is said of an engine of this version; None if it is supported. `pip`: the command that installs."""
        if self.supports(version):
            return None
        known = " and ".join(self.supported)
        return (
            f"{self.engine} {version} is not a version that this program supports ({known}): if it fails or its "
            f"log-probabilities differ, run `{pip} install {self.packages[0]}=={self.installs}` in its environment"
        )

    def doubt_of_failed(self, python: str) -> str:
        """What the installed version may have to do with a server of this interpreter that does not start; or nothing.

        Takes the time in which Python starts.
        """
        version, pip = installed_version(python, self.packages), f"{python} -m pip"
        if version == "none":
            package = self.packages[0]
            return (
                f"; {python} has no package {package}: run `{pip} install {package}=={self.installs}`, or set"
                " rollout.servers.python to the Python of the engine's environment"
            )
        doubt = None if version is None else self.doubt(version, pip)
        return "" if doubt is None else f"; {doubt}"


def installed_version(python: str, packages: Sequence[str]) -> str | None:
    """The version of the first of these packages that an interpreter has; "none" if it has none, None if unknown."""
    try:
        command = [python, "-c", _INSTALLED, *packages]
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    lines = done.stdout.split()
    return lines[-1] if done.returncode == 0 and lines else None


def check_version(versions: EngineVersions, answer: str, where: str) -> None:
    """Warn if a server's answer to `ServerAdapter.asks_for_version` names a version that is not supported."""
    try:
        version = json.loads(answer)["version"]
    except (ValueError, KeyError, TypeError):
        log.info("%s at %s does not say which version it is", versions.engine, where)
        return
    if (doubt := versions.doubt(str(version))) is not None:
        _warn_once(doubt)


@functools.cache
def _warn_once(words: str) -> None:
    """Of several servers, and of one that starts again, the same is said once."""
    log.warning("%s", words)
