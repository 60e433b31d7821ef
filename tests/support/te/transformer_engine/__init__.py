"""A stand-in for Transformer Engine on a CPU: it proves our wiring and Megatron-Core's calls, not Transformer Engine.

It has the names and signatures of TE 2.11 that megatron.core.extensions.transformer_engine touches, in plain torch,
with the checks that TE makes of its arguments and shapes. Nothing is computed in FP8: `fp8_autocast` says that it is
on, the layers check what TE would check then, and `pytorch.record` has what they were called with. Only the processes
of `tests.support.fork_server.TE_FORK_SERVER` have it on their path.
"""

from transformer_engine import common, pytorch

__version__ = "2.11.0"
__all__ = ["common", "pytorch"]
