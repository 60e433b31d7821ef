"""All uses of private names of Megatron-Core and torch, and all workarounds for faults in them.

    versions.py            what differs between the versions of Megatron-Core
    optimizer.py           the distributed optimizer's groups, Adam state and who has what of it
    dispatcher.py          what the dispatcher of a mixture of experts keeps between passes
    cpu_backend.py         Megatron-Core's CUDA calls on a machine without CUDA
    gloo_devices.py        one gloo device for all process groups of a rank, and one worker thread for each
    process_groups.py      a layout's process groups, and the functions that read them from globals
    transformer_engine.py  whether Transformer Engine can be imported, and which attention it chose
    torch_private.py       torch's process groups and their counters, checkpoint records, shared GPU memory

Each function states the version that it is for, where the cause is in that version's source, and what breaks without
it. What is said of Megatron-Core 0.16.1 is so in 0.19.2 too, where versions.py does not say otherwise: it was read in
both sources, and the tests run with both.
After an upgrade of Megatron-Core (0.16.1 and 0.19.2) or torch (2.10 to 2.13), check these files first. Paths are below
`megatron/core/` or `torch/`. `rollout/vllm_worker.py` has its own copy of the calls that it needs: it runs in vLLM's
environment, without this package.
"""
