# shellcheck shell=bash
# Sourced first by each job: the settings, the address where its processes meet, and preflight on each of its nodes.
# shellcheck disable=SC2034  # read by site.sh
in_job=1
# shellcheck source=slurm/site.sh
. slurm/site.sh

read -r MASTER_ADDR < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
MASTER_PORT=$((10000 + SLURM_JOB_ID % 20000)) # below 32768, where the ports begin that the kernel hands out by itself
export MASTER_ADDR MASTER_PORT OMP_NUM_THREADS="${OMP_NUM_THREADS:-$CPUS}"
# --wait: 60 s after one process has ended, those that still hang are ended too. Without --cpus-per-task srun gives one CPU.
step=(srun --mpi=none --wait=60 --cpus-per-task="$CPUS")

check() { # EXIT_STATUS of a step: 138 (128 + 10) means that USR1 ended it before train_qlora.py could catch the signal
  if [ "$1" = 138 ]; then
    fail "the time limit came before the first step: raise TIME ($TIME, of which the last $GRACE s are for saving)"
  fi
}

echo "job $SLURM_JOB_ID, restart ${SLURM_RESTART_COUNT:-0}, on $SLURM_JOB_NODELIST, $(date -u +%FT%TZ)"
"${step[@]}" --ntasks="$SLURM_NNODES" --ntasks-per-node=1 "${python[@]}" -m ouro.cluster.preflight "$@" ||
  { status=$?; check "$status"; exit "$status"; }
