# shellcheck shell=bash
# Sourced first by each job: settings, where its processes meet, preflight on each of its nodes.
# shellcheck source=slurm/site.sh
. slurm/site.sh

read -r MASTER_ADDR < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
MASTER_PORT=$((10000 + SLURM_JOB_ID % 20000)) # below the ports that the kernel hands out
export MASTER_ADDR MASTER_PORT OMP_NUM_THREADS="${OMP_NUM_THREADS:-$CPUS}"
# --wait: when one process has ended and the others hang, they are ended too. srun's own default for CPUs is one.
step=(srun --mpi=none --wait=60 --cpus-per-task="$CPUS")

check() { # EXIT_STATUS of a step: 138 is 128 + USR1, which train_qlora.py would have made 75
  if [ "$1" = 138 ]; then
    fail "the time limit came before the first step: raise TIME ($TIME, of which the last $GRACE s are for saving)"
  fi
}

echo "job $SLURM_JOB_ID, restart ${SLURM_RESTART_COUNT:-0}, on $SLURM_JOB_NODELIST, $(date -u +%FT%TZ)"
"${step[@]}" --ntasks="$SLURM_NNODES" --ntasks-per-node=1 "${python[@]}" -m ouro.cluster.preflight "$@" ||
  { status=$?; check "$status"; exit "$status"; }
