# shellcheck shell=bash
# Sourced in the repository by everything that runs on a cluster: the settings (the environment's, else site.env's, else
# the example's), modules, proxy; `train` and `score`, the options of sbatch; `python`, the command that runs our scripts.
fail() { echo "error: ${*//[[:cntrl:]]/?}" >&2; exit 2; } # one line, and a terminal obeys nothing in it

# Slurm's commands take options from variables as well. Outside of our jobs those of the session that this shell may run
# in (salloc, Jupyter) and those that change what squeue prints or sbatch asks are dropped; site.env can set any of them.
if [ -z "${in_job:-}" ]; then
  for name in $(compgen -e); do
    case $name in
      SLURM_CONF | SLURM_CONF_SERVER | SLURM_CLUSTERS | SLURM_JWT | SBATCH_ACCOUNT | SBATCH_QOS | SBATCH_CONSTRAINT | SBATCH_RESERVATION | SBATCH_WCKEY) ;;
      SBATCH_*) echo "not heeded: $name=${!name//[[:cntrl:]]/?}; if it is meant, write it into slurm/site.env" >&2 && unset "$name" ;;
      SLURM_* | SQUEUE_* | SCANCEL_* | SCONTROL_* | SRUN_* | SALLOC_*) unset "$name" ;;
    esac
  done
fi
[ -d "${TMPDIR:-/tmp}" ] || unset TMPDIR # of a session on another node

set -a
# shellcheck source=/dev/null
if [ -e slurm/site.env ]; then . slurm/site.env; fi
# shellcheck source=slurm/site.env.example
. slurm/site.env.example
set +a

# shellcheck disable=SC2034  # used by those who source this
{
  train=(--partition="$PARTITION" --nodes="$NODES" --ntasks-per-node="$GPUS" --gres="gpu:$GPUS" --cpus-per-task="$CPUS"
    --mem="$MEM" --time="$TIME" --signal="USR1@$GRACE")
  score=(--partition="$PARTITION" --nodes=1 --ntasks=1 --gres=gpu:1 --cpus-per-task="$CPUS" --mem="$EVAL_MEM"
    --time="$EVAL_TIME")
}

if [ -n "$MODULES" ]; then
  set +u # the scripts of modules read variables that are not set
  for file in /etc/profile.d/{modules,lmod}.sh; do
    # shellcheck source=/dev/null
    if ! command -v module >/dev/null && [ -e "$file" ]; then . "$file"; fi
  done
  command -v module >/dev/null || fail "MODULES = $MODULES, and there is no command module here: empty it in slurm/site.env"
  # shellcheck disable=SC2086  # one word a module
  module load $MODULES || fail "module load $MODULES failed: correct MODULES in slurm/site.env (module avail lists them)"
  set -u
fi

if [ -n "${SLURM_JOB_ID:-}" ]; then # the login node's proxy seldom works in a job
  unset http_proxy https_proxy all_proxy HTTP_PROXY HTTPS_PROXY ALL_PROXY
  if [ -n "$PROXY" ]; then export http_proxy=$PROXY https_proxy=$PROXY; fi
fi

# For manifests: a node or an image may lack git, and then has what the login node's said.
if commit=$(git describe --always --dirty --abbrev=40 --exclude '*' 2>/dev/null); then export OURO_THAI_COMMIT=$commit; fi

python=("${PYTHON_BIN:-.venv/bin/python}")
if [ -n "$IMAGE" ]; then
  runner=$(command -v apptainer || command -v singularity) ||
    fail "IMAGE is set, and neither apptainer nor singularity is found on $(uname -n): name the module that brings it as MODULES in slurm/site.env"
  case $PWD$HF_HOME${TMPDIR:-} in *[,:]*) fail "with IMAGE the paths of this folder, HF_HOME and TMPDIR can hold no comma or colon" ;; esac
  [ -e "$IMAGE" ] || fail "no image $IMAGE on $(uname -n): build it with make sif, or correct IMAGE in slurm/site.env"
  mkdir -p "$HF_HOME"
  # --contain leaves a /tmp and a /dev/shm of 64 MB, which compiled kernels and NCCL outgrow.
  python=("$runner" exec --nv --contain --writable-tmpfs --env "HF_HOME=$HF_HOME" --pwd "$PWD" --bind "$PWD"
    --bind "$HF_HOME" --bind "${TMPDIR:-/tmp}:/tmp" --bind /dev/shm)
  if [ -e /dev/infiniband ]; then python+=(--bind /dev/infiniband); fi
  binds=$(xargs -rn1 printf '%s\n' <<<"$BINDS") || fail "BINDS = $BINDS has a quote that is not closed"
  while IFS= read -r place; do
    [ -z "$place" ] && continue
    [ -e "${place%%:*}" ] || fail "BINDS = $BINDS: no $place on $(uname -n); quote a path with spaces, as BINDS=\"'/my data' /scratch\""
    python+=(--bind "$place")
  done <<<"$binds"
  python+=("$IMAGE" python)
fi

# Our jobs that wait or run: job, state, reason, what it works on (as run_experiments.sh put it), folder of the clone.
live_jobs() {
  local said
  if ! command -v squeue >/dev/null; then return; fi
  { said=$(squeue --me -h -o $'%i\t%T\t%r\t%k\t%Z' 2>&1 >&3); } 3>&1 ||
    fail "squeue is here, and no Slurm answers it ($(tail -n 1 <<<"$said")): type this on a cluster's login node"
}

# Whether Slurm would take a training job, for preflight, which may run where there is no sbatch.
slurm_says() {
  if command -v sbatch >/dev/null && (live_jobs) >/dev/null 2>&1; then
    sbatch --test-only "${train[@]}" --wrap true 2>&1 || true
    scontrol show partition "$PARTITION" -o 2>&1 || true
  fi
}
