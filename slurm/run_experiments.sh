#!/usr/bin/env bash
# Submits the study: training of each experiment, its evaluation after it, the report after all. `make cluster-sweep`
# calls it; harmless to repeat: what is complete, queued or running is left alone, what was interrupted continues.
#
#   CONFIG=configs/a100.yaml EXPS="exp1-wangchan-ut4 exp2-wangchan-ut1" SEEDS="0 1 2" ARGS="--learning_rate 1e-4" \
#     DRY=1 slurm/run_experiments.sh
#
# STUDY=english (a row of configs/studies.yaml) in place of EXPS; it has seeds of its own, which SEEDS replaces.
# DRY=1 only prints what would be submitted. Without SEEDS each experiment has the config's seed and runs in
# OUTPUT_DIR/<experiment>, with SEEDS in OUTPUT_DIR/seed<n>/<experiment>. ARGS are further settings of train_qlora.py,
# on any number of lines, quoted as in a shell.
# What there is to do is decided by ouro/cluster/sweep.py; here it is only submitted, and ids become dependencies.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=slurm/site.sh
. slurm/site.sh
dry=${DRY:-}
[ "$dry" != 0 ] || dry=
[[ "$NODES" =~ ^[1-9][0-9]*$ && "$GPUS" =~ ^[1-9][0-9]*$ ]] || fail "NODES = $NODES and GPUS = $GPUS must be whole numbers"
[ -n "$dry" ] || command -v sbatch >/dev/null ||
  fail "no sbatch here: run this on the cluster's login node; DRY=1 shows the plan anywhere"

# The queue is read before the folders: a job that ends in between is then complete, and not submitted again.
queue=$(live_jobs) || { [ -n "$dry" ] && echo "squeue failed: what is queued or running is not known"; }
[ -z "${STUDY:-}" ] || [ -z "${EXPS:-}" ] || fail "STUDY=$STUDY names its experiments: leave EXPS out"
plan=$("${python[@]}" -m ouro.cluster.sweep --processes $((NODES * GPUS)) --seeds "${SEEDS:-}" \
  --exps "${EXPS:-exp1-wangchan-ut4 exp2-wangchan-ut1 exp3a-wangchan-ut2 exp3b-wangchan-ut3}" \
  --study "${STUDY:-}" --config "${CONFIG:-configs/a100.yaml}" --args="${ARGS:-}" <<<"$queue")

quoted() { printf "'%s' " "${@//\'/\'\\\'\'}"; } # for sh, which does not know the $'…' of printf %q
row() { printf '%-8s %-36s %-12s %4s  %-11s %-27s %s\n' "${@//[[:cntrl:]]/?}"; }
submit() { # SBATCH_ARGUMENT... of the job that the loop below has read; sets its id
  [ -z "$dry" ] || return 0
  mkdir -p slurm/logs
  id=$(EVALUATED=$scores/evaluated sbatch --parsable --export=ALL --chdir="$PWD" --comment="$kind $folder" \
    --job-name="$name" --output="slurm/logs/%j_$name.out" --error="slurm/logs/%j_$name.err" "$@") ||
    fail "Slurm does not take $name: correct slurm/site.env; make preflight looks at it"
  id=${id%%;*} # a federation adds the cluster's name
  printf '%s\t%s\t%s\t%s\t%s\n' "$id" "$kind" "$name" "$folder" "$scores" >>slurm/logs/jobs.tsv
}

refused=0 trained=- scored=()
row job name 'depends on' GPUs 'time limit' 'predicted hours' state
while IFS=$'\t' read -r -a field; do
  kind=${field[0]} name=${field[1]} folder=${field[2]} scores=${field[3]} id=${field[4]} hours=${field[5]} state=${field[6]}
  arguments=("${field[@]:7}") after=- gpus=- limit=-
  if [ "$kind" = total ]; then echo "$state"; continue; fi
  case $kind-$id in
    train-new)
      gpus=$((NODES * GPUS)) limit=$TIME
      submit "${train[@]}" slurm/train.sbatch "${arguments[@]}" ;;
    eval-new)
      gpus=1 limit=$EVAL_TIME after=$trained
      if [ "$after" = - ]; then depends=(); else depends=(--dependency="afterok:$after"); fi
      submit "${score[@]}" "${depends[@]}" slurm/eval.sbatch "${arguments[@]}" ;;
    report-*)
      [ "$id" = new ] || [ -n "$dry" ] || scancel "$id"
      id=new gpus=0 limit=$EVAL_TIME after='all of these'
      submit --partition="$PARTITION" --mem="$EVAL_MEM" --time="$EVAL_TIME" \
        --dependency="afterany:$(IFS=:; echo "${scored[*]}")" --wrap "$(quoted "${python[@]}" report.py "${arguments[@]}")" ;;
  esac
  row "$id" "$name" "$after" "$gpus" "$limit" "$hours" "$state"
  if [ "$kind" = train ]; then trained=$id; elif [ "$id" != - ]; then scored+=("$id"); fi
  if [[ $state = refused* ]]; then refused=2; fi
done <<<"$plan"
if [ -n "$dry" ]; then
  echo 'DRY: nothing was submitted'
else
  echo 'make status shows how far they are; make logs EXP=…; make cancel'
fi
exit $refused
