"""The parts of tools/gpu_check.py: what is looked at in the first hour on a GPU.

`driver` runs each part of `catalog` in a process of its own (`__main__`). A part is a module with
`run(setting, records)`. It writes what it finds to `records`, and each record is in its file before the next is made.
"""
