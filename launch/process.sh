#!/usr/bin/env bash
# Runs one of the processes that srun starts. Sets the rank variables that torch.distributed reads.
export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS
exec "$@"
