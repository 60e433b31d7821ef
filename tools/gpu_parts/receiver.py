"""A receiver of weights in place of an inference server: python -m gpu_parts.receiver SETTING DIES_AT

It takes the calls of `transfer.Adapter`, loads each bucket as a server's worker does, and adds the checksum to
FOLDER/received.jsonl. At the call number DIES_AT, counted from 1, it kills itself when the sender has begun; 0: never.
"""

from __future__ import annotations

import base64
import json
import os
import signal
import sys
from datetime import timedelta
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from gpu_parts.setting import Setting, is_null_gpu
from megatron_tempo.models.megatron_compat.torch_private import join_separate_group
from megatron_tempo.rollout.checksum import checksum

RECEIVED, PORT = "received.jsonl", "receiver-port"


class Receiver:
    """Joins a sender's group, and receives buckets in it or opens their memory."""

    def __init__(self, setting: Setting, dies_at: int) -> None:
        self._setting, self._dies_at, self._count = setting, dies_at, 0
        self._device = torch.device("cpu")
        if setting.device == "cuda":
            self._device = torch.device("cuda", torch.cuda.device_count() - 1)
            torch.cuda.set_device(self._device)
        self._group: dist.ProcessGroup | None = None

    def join(self, call: dict[str, Any]) -> None:
        timeout = timedelta(seconds=call["seconds"])
        store = dist.TCPStore(call["host"], call["port"], is_master=False, timeout=timeout)
        prefixed = dist.PrefixStore(call["group"], store)
        self._group = join_separate_group(prefixed, call["group"], 1, call["world"], call["backend"], timeout)

    def update(self, call: dict[str, Any]) -> None:
        self._count += 1
        if self._count == self._dies_at:
            os.kill(os.getpid(), signal.SIGKILL)
        received = checksum(self._bucket(call))
        with (self._setting.folder / RECEIVED).open("a", encoding="utf-8") as file:
            file.write(json.dumps({"name": call["name"], "checksum": received}) + "\n")

    def _bucket(self, call: dict[str, Any]) -> Tensor:
        if call["handle"] is not None:
            return torch.empty(0, dtype=torch.uint8, device=self._device).set_(opened(call["handle"]))
        flat = torch.empty(call["bytes"], dtype=torch.uint8, device=self._device)
        dist.broadcast(flat, src=0, group=self._group)
        return flat


def opened(handle: list[Any]) -> torch.UntypedStorage:
    """The sender's memory, as vllm_worker.py opens it: by the GPU's UUID and torch's arguments, bytes as base64."""
    torch.cuda.init()
    uuids = [str(torch.cuda.get_device_properties(index).uuid) for index in range(torch.cuda.device_count())]
    rest = (base64.b64decode(part) if isinstance(part, str) else part for part in handle[1:])
    return torch.UntypedStorage._new_shared_cuda(uuids.index(handle[0]), *rest)


def serve(receiver: Receiver, setting: Setting) -> None:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            getattr(receiver, self.path.removeprefix("/"))(body)
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        port = setting.folder / f"{PORT}.new"
        port.write_text(str(server.server_port), encoding="utf-8")
        port.rename(setting.folder / PORT)
        server.serve_forever()


def main(written: str, dies_at: str) -> None:
    setting = Setting.read(written)
    if is_null_gpu():
        from gpu_parts import null

        null.prepare(trains=False)
    serve(Receiver(setting, int(dies_at)), setting)


if __name__ == "__main__":
    main(*sys.argv[1:])
