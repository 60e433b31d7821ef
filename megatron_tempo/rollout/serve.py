"""Rollout servers on their own nodes. The trainer, on other nodes, finds them by a shared folder.

FOLDER/
    key                  the servers' key; must exist before
    addresses/HOST-I     http://HOST:PORT of server I of a node, once it is ready for the first time
    HOST/I/              what the server writes, including its log
"""

from __future__ import annotations

import logging
import socket
import time
from contextlib import ExitStack
from pathlib import Path

import torch

from megatron_tempo.config.schema import Config
from megatron_tempo.errors import InputError
from megatron_tempo.files import read_text, replace_file
from megatron_tempo.nullgpu.guard import refuse_null_gpu
from megatron_tempo.rollout.addresses import chosen_devices
from megatron_tempo.rollout.build import engine_precision, server_adapter_of
from megatron_tempo.rollout.server import Server

log = logging.getLogger(__name__)

LOOK_SECONDS = 1.0  # between two checks of the servers


def serve(config: Config, folder: Path) -> None:
    """Start `rollout.servers.replicas` servers here and keep them running until this process ends.

    A server that ends is restarted at its address, `rollout.servers.restarts` times. Raises EngineError with the end of
    its log if one does not become ready, InputError if there is no key, or on the null GPU.
    """
    refuse_null_gpu("serve")
    try:
        key = read_text(folder / "key").strip()
    except InputError as error:
        raise InputError(f"--folder={folder} holds no key: {error}") from error
    count, host = config.rollout.servers.replicas, socket.gethostname()
    restarts = [config.rollout.servers.restarts] * count
    with ExitStack() as stack:
        servers: list[Server | None] = [_start(config, folder / host, key, i, None) for i in range(count)]
        stack.callback(_close, servers)
        for i, server in enumerate(servers):
            assert server is not None
            server.wait()
            _publish_address(folder / "addresses", f"{host}-{i}", server.url)
        while True:
            time.sleep(LOOK_SECONDS)
            for i, server in enumerate(servers):
                if server is not None and server.process.poll() is not None:
                    server.close()  # its remaining processes
                    servers[i] = _again(config, folder / host, key, i, server) if restarts[i] else None
                    restarts[i] -= 1


def _close(servers: list[Server | None]) -> None:
    for server in servers:
        if server is not None:
            server.close()


def _again(config: Config, folder: Path, key: str, index: int, old: Server) -> Server:
    log.warning("server %d ended with exit code %s: started again at %s", index, old.process.returncode, old.url)
    return _start(config, folder, key, index, old.port)


def _start(config: Config, folder: Path, key: str, index: int, port: int | None) -> Server:
    cpu, servers = not torch.cuda.is_available(), config.rollout.servers
    devices = servers.devices or list(range(servers.replicas * servers.tensor))
    own = devices[index * servers.tensor : (index + 1) * servers.tensor]
    visible = "" if cpu else ",".join(chosen_devices(own))
    model, precision = Path(config.model.path), engine_precision(config)
    return Server(
        server_adapter_of(config, cpu=cpu), servers, model, folder / str(index), key, precision, visible, port
    )


def _publish_address(folder: Path, name: str, url: str) -> None:
    """Write the address to a file that appears complete. It is of no use after a crash of the machine."""
    folder.mkdir(parents=True, exist_ok=True)
    replace_file(folder / name, url + "\n", fsync=False)
