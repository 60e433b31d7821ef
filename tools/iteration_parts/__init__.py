"""The parts of tools/bench_iteration.py."""
