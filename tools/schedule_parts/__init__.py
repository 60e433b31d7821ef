"""Parts of tools/bench_schedules.py."""
