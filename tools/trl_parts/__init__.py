"""The parts of tools/bench_trl.py. `work` and `trl_grpo` run in TRL's environment, so they import nothing of ours."""
