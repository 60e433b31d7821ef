"""Training: builds a run from a configuration, and runs its iterations."""
