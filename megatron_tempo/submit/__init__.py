"""SLURM jobs: their processes and nodes, the sbatch script, and the snapshot that a job runs from."""
