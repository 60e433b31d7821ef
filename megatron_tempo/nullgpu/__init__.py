"""A CUDA device that has memory and computes nothing, for rehearsals of the GPU program on machines without a GPU.

`build` makes the libraries, `environment` says how a process gets them, `counters` reads what such a process asked of
the device, and `guard` keeps everything but a rehearsal from running on it.
"""
