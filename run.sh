#!/usr/bin/env bash
# Builds the Docker image; runs a command in it as you, on all GPUs (on none where nvidia-smi is not found).
#
#   ./run.sh build
#   ./run.sh make smoke
#   WANDB_API_KEY=… REPORT_TO=wandb HF_HOME=/data/huggingface ./run.sh make train EXP=exp2-wangchan-ut1
#   COMPOSE=podman-compose ./run.sh make smoke
#
# output/, results/, cache/ and the Hugging Face cache are this machine's.
set -euo pipefail
cd "$(dirname "$0")"
read -rd '' -a compose <<<"${COMPOSE:-docker compose}" || true # on any number of lines
if [ $# -eq 0 ]; then sed -n '2,/^set/s/^# \{0,1\}//p' "$0"; exit 2; fi
if ! "${compose[@]}" version >/dev/null 2>&1; then
  echo "run.sh: '${compose[*]}' is not here; install Docker with its compose plugin, or name another: COMPOSE=podman-compose" >&2
  exit 2
fi

if [ "$1" = build ]; then
  COMMIT=$(git describe --always --dirty --abbrev=40 --exclude '*' 2>/dev/null || echo unknown)
  export COMMIT
  exec "${compose[@]}" build cpu
fi
RUN_AS=$(id -u):$(id -g)
export RUN_AS HF_HOME=${HF_HOME:-$HOME/.cache/huggingface}
mkdir -p output results cache "$HF_HOME" # else Docker makes them, as root
service=cpu
if command -v nvidia-smi >/dev/null; then service=gpu; fi
exec "${compose[@]}" run --rm "$service" "$@"
