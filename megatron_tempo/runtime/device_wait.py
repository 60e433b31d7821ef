"""Whether a thread waits for a GPU, from its bytecode.

NCCL's collectives only queue work on the GPU. A rank whose peers do not come continues until it needs a number from
the GPU, such as in `loss.item()`, and stays there. That call is a C function, so it has no frame of its own. The
instruction at which the innermost frame stands names it.
"""

from __future__ import annotations

import dis
from types import FrameType

# Calls that copy from the GPU to the host, or wait for it. On a CPU they take no time, so a thread that is found in one
# for minutes waits for a device.
_CALLS = {"item", "tolist", "cpu", "numpy", "to", "copy_", "nonzero", "unique", "masked_select", "equal", "is_nonzero"}
_CALLS |= {"synchronize", "_cuda_synchronize", "float", "int", "bool"}
# Instructions that ask a tensor for its truth value.
_TRUTH = ("TO_BOOL", "UNARY_NOT", "POP_JUMP", "JUMP_IF")


def waits_for_device(frame: FrameType) -> bool:
    """Whether the instruction at which a thread's innermost frame stands copies from a GPU or waits for it."""
    before: list[dis.Instruction] = []
    for instruction in dis.get_instructions(frame.f_code):
        if instruction.offset == frame.f_lasti:
            is_call = instruction.opname.startswith("CALL")
            return _callee(before, instruction) in _CALLS if is_call else instruction.opname.startswith(_TRUTH)
        before.append(instruction)
    return False


def _callee(before: list[dis.Instruction], call: dis.Instruction) -> str:
    """The name that a call calls: the last one loaded that begins where the call does. Its arguments begin later."""
    if call.positions is None:
        return ""
    start = call.positions.lineno, call.positions.col_offset
    for instruction in reversed(before):
        at = instruction.positions
        if at is not None and (at.lineno, at.col_offset) == start and instruction.opname.startswith("LOAD_"):
            return str(instruction.argval)
    return ""
