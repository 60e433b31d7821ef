"""A SGLang server that this run starts, and ends with it.

It lives in a Python environment of its own: the trainer does not import it. It listens at the address that the config
names, and answers nobody without the key, which is drawn for each start and handed over in a file that only this user
can read.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx

from megatron_tempo.config.schema import Precision, SglangConfig
from megatron_tempo.errors import InputError

_ON_CPU = [
    "--device=cpu",
    "--attention-backend=torch_native",
    "--sampling-backend=pytorch",
    "--grammar-backend=none",
    "--disable-cuda-graph",
]
_LEFT_OUT = ("generation_config.json", ".safetensors.index.json")
_DTYPES = {Precision.fp32: "float32", Precision.bf16: "bfloat16"}


class SglangServer:
    """The process and its address. `url` and `key` are what a client needs."""

    def __init__(self, config: SglangConfig, model: Path, work: Path, precision: Precision, *, cuda: bool) -> None:
        """Start it with random weights: the real ones come from the trainer. It writes below `work`.

        Raises InputError with the end of its log if it ends or is not ready within `config.start_seconds`.
        """
        work.mkdir(parents=True, exist_ok=True)
        port = _free_port(config.host)
        self.url, self.key = f"http://{config.host}:{port}", secrets.token_urlsafe(24)
        self.log = work / "sglang.log"
        arguments: dict[str, Any] = {
            "model-path": str(_engine_folder(model, work / "model")),
            "load-format": "dummy",
            "dtype": _DTYPES[precision],
            "tp-size": config.tensor,
            "host": config.host,
            "port": port,
            "api-key": self.key,
            "skip-server-warmup": True,
        }
        environment = {name: value for name, value in os.environ.items() if not _of_torchrun(name)}
        if not cuda:
            environment |= {"SGLANG_USE_CPU_ENGINE": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        elif config.devices is not None:
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, config.devices))
        private = _private(work / "arguments.yaml", arguments)
        command = [
            sys.executable,
            "-c",
            _WITH_ITS_PARENT,
            config.python,
            "-m",
            "sglang.launch_server",
            "--config",
            str(private),
        ]
        command += [*([] if cuda else _ON_CPU), *config.arguments]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
        try:
            self._wait(config.start_seconds)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End it and all its processes."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def last_words(self) -> str:
        lines = self.log.read_text(errors="replace").splitlines()
        return "\n".join(["", f"the end of {self.log}:", *lines[-15:]])

    def _wait(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        with httpx.Client(headers={"Authorization": f"Bearer {self.key}"}, timeout=5.0) as client:
            while time.monotonic() < deadline:
                if self.process.poll() is not None:
                    raise InputError(f"SGLang ended with exit code {self.process.returncode}" + self.last_words())
                with contextlib.suppress(httpx.HTTPError):  # not listening yet
                    if client.get(f"{self.url}/health").status_code == 200:
                        return
                time.sleep(0.5)
        raise InputError(
            f"SGLang was not ready within rollout.sglang.start_seconds={seconds:g}: raise it, or see why"
            + self.last_words()
        )


# The server must not outlive a trainer that is killed: Linux ends it with its parent (PR_SET_PDEATHSIG is 1).
_WITH_ITS_PARENT = f"""
import ctypes, os, sys
ctypes.CDLL(None).prctl(1, {int(signal.SIGKILL)})
os.execvp(sys.argv[1], sys.argv[1:])
"""


def _of_torchrun(name: str) -> bool:
    """Whether a variable tells a process of its place among the trainer's: a server that sees them waits for others."""
    ranks = ("RANK", "WORLD_SIZE", "MASTER_", "LOCAL_", "GROUP_", "ROLE_", "TORCHELASTIC_")
    return name.startswith(ranks)


def _free_port(host: str) -> int:
    with socket.socket() as probe:
        probe.bind((host, 0))
        return probe.getsockname()[1]


def _private(path: Path, arguments: dict[str, Any]) -> Path:
    """The arguments as YAML, of which JSON is a part, in a file for this user alone."""
    path.unlink(missing_ok=True)
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        json.dump(arguments, file)
    return path


def _engine_folder(model: Path, folder: Path) -> Path:
    """Config and tokenizer of a Hugging Face folder, without its weights, as SGLang reads them.

    Without generation_config.json too: each request says how it is to be sampled, and what ends it.

    transformers 5 keeps the rotary base in `rope_parameters`; SGLang looks for `rope_theta` and silently takes 10,000
    where it finds none.
    """
    folder.mkdir(exist_ok=True)
    for file in model.iterdir():
        if file.suffix in (".json", ".jinja", ".txt", ".model") and not file.name.endswith(_LEFT_OUT):
            shutil.copyfile(file, folder / file.name)
    config = json.loads((model / "config.json").read_text())
    rope = config.pop("rope_parameters", None)
    if rope is not None:
        config["rope_theta"] = rope["rope_theta"]
        if rope.get("rope_type", "default") != "default":
            config["rope_scaling"] = {name: value for name, value in rope.items() if name != "rope_theta"}
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    return folder
