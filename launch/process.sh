#!/usr/bin/env bash
# One of the processes that srun starts: its place among them, in the words that torch.distributed reads.
export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS
exec "$@"
