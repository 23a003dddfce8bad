#!/usr/bin/env bash
# Runs a command as one of the processes of a job, told what torchrun would tell it.
set -euo pipefail
if [ "$SLURM_NTASKS" -gt 1 ]; then
  export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS
  export LOCAL_WORLD_SIZE=$((SLURM_NTASKS / SLURM_NNODES))
fi
exec "$@"
