"""Jobs for SLURM: what is to be started where, the script that does it, the snapshot that it runs from."""
