"""A bucket in a GPU's memory, opened by another process in the ways of both engines."""

from __future__ import annotations

import ast
import base64
import io
import json
import subprocess
import sys

import pytest
import torch

from megatron_tempo.rollout.cuda_memory import Pickler, handle
from megatron_tempo.rollout.vllm import WORKER

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA")]

# What a worker does, without the engine around it: {functions} are vLLM's, the lookup by UUID and the copy to the
# current device are SGLang's.
READER = """
import base64, json, pickle, sys
from typing import Any
import torch
from torch import Tensor
from torch.multiprocessing import reductions

torch.cuda.set_device(int(sys.argv[1]))

{functions}

original = reductions.rebuild_cuda_tensor

def by_uuid(*args):
    uuids = [str(torch.cuda.get_device_properties(i).uuid) for i in range(torch.cuda.device_count())]
    return original(*args[:6], uuids.index(args[6]), *args[7:])

reductions.rebuild_cuda_tensor = by_uuid
given = json.load(sys.stdin)
own = torch.device("cuda", torch.cuda.current_device())
flat = bytes_on(opened(given["handle"]), own)
named = [(name, one.to(own)) for name, one in pickle.loads(base64.b64decode(given["pickled"]))]
assert {{flat.device, *(one.device for _, one in named)}} == {{own}}
print(json.dumps({{"bytes": flat.cpu().tolist(), "named": {{name: one.cpu().tolist() for name, one in named}}}}))
"""


@pytest.mark.parametrize(("ours", "theirs"), [(0, 0), (0, 1), (1, 0)])
def test_another_process_reads_the_bucket(ours: int, theirs: int) -> None:
    """From the GPU of the rank that sends, which may be another than the worker's."""
    if max(ours, theirs) >= torch.cuda.device_count():
        pytest.skip("one GPU")
    flat = torch.arange(12, dtype=torch.float32, device=torch.device("cuda", ours))
    bucket = [("a", flat[:4].view(2, 2)), ("b", flat[4:])]
    pickled = io.BytesIO()
    Pickler(pickled).dump(bucket)
    given = {
        "handle": handle(flat.untyped_storage()),
        "pickled": base64.b64encode(pickled.getvalue()).decode(),
    }
    source = WORKER.read_text()
    functions = [node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)]
    used = [ast.get_source_segment(source, node) for node in functions if node.name in ("opened", "bytes_on")]
    assert len(used) == 2
    script = READER.format(functions="\n\n".join(map(str, used)))
    done = subprocess.run(
        [sys.executable, "-c", script, str(theirs)],
        input=json.dumps(given),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    received = json.loads(done.stdout)
    assert torch.tensor(received["bytes"], dtype=torch.uint8).equal(flat.cpu().view(torch.uint8))
    assert received["named"] == {name: tensor.tolist() for name, tensor in bucket}
