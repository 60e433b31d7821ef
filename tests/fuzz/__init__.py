"""The fuzzer: damaged configurations, data files, run folders and model folders, tried on the real commands.

    make fuzz                                                       # a minute, with a seed of the clock
    python -m tests.fuzz --seconds 600 --kind run                   # only damaged run folders
    python -m tests.fuzz --kind run --seed 17 --cases 1 --keep DIR  # one case again, its files kept in DIR

Each case writes good files (`inputs`), damages them (`mutations`), gives them to commands (`cases`), and looks at what
the commands did (`judge`). A case is made from its kind and seed alone. It runs in a process of its own, with bounded
time and memory.
"""
