#!/usr/bin/env bash
# Submits the study: training of each experiment, its evaluation after it, the report after all. `make cluster-sweep`
# calls it; harmless to repeat: what is complete, queued or running is left alone, what was interrupted continues.
#
#   CONFIG=configs/a100.yaml EXPS="exp1-wangchan-ut4 exp2-wangchan-ut1" SEEDS="0 1 2" ARGS="--learning_rate 1e-4" \
#     DRY=1 slurm/run_experiments.sh
#
# DRY=1 only prints what would be submitted. Without SEEDS each experiment has the config's seed and runs in
# OUTPUT_DIR/<experiment>, with SEEDS in OUTPUT_DIR/seed<n>/<experiment>. ARGS are further settings of train_qlora.py.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=slurm/site.sh
. slurm/site.sh
config=${CONFIG:-configs/a100.yaml} dry=${DRY:-}
[ "$dry" != 0 ] || dry=
[[ "$NODES" =~ ^[1-9][0-9]*$ && "$GPUS" =~ ^[1-9][0-9]*$ ]] || fail "NODES = $NODES and GPUS = $GPUS must be whole numbers"
exps=${EXPS:-exp1-wangchan-ut4 exp2-wangchan-ut1 exp3a-wangchan-ut2 exp3b-wangchan-ut3}
[ -n "$dry" ] || command -v sbatch >/dev/null ||
  fail "no sbatch here: run this on the cluster's login node; DRY=1 shows the plan anywhere"

read -r -a more <<<"${ARGS:-}"
live=$(live_jobs) || { [ -n "$dry" ] && echo "squeue failed: what is queued or running is not known"; } # before the plan: a job that ends meanwhile is then complete, not submitted again
plan=$("${python[@]}" -m ouro.cluster.sweep --plan --exps "$exps" --seeds "${SEEDS:-}" --processes $((NODES * GPUS)) \
  --config "$config" "${more[@]}")
row() { printf '%-8s %-36s %-12s %4s  %-11s %-27s %s\n' "$@"; }
job_for() { awk -F '\t' -v what="$1" '$4 == what { print $1, $2; exit }' <<<"$live"; } # its id and state
submit() { # KIND NAME FOLDER RESULTS SBATCH_ARGUMENT...
  local kind=$1 name=$2 folder=$3 results=$4
  shift 4
  if [ -n "$dry" ]; then id=new; return; fi
  mkdir -p slurm/logs
  id=$(sbatch --parsable --export=ALL --chdir="$PWD" --comment="$kind $folder" --job-name="$name" --output="slurm/logs/%j_$name.out" \
    --error="slurm/logs/%j_$name.err" "$@")
  id=${id%%;*} # a federation adds the cluster's name
  printf '%s\t%s\t%s\t%s\t%s\n' "$id" "$kind" "$name" "$folder" "$results" >>slurm/logs/jobs.tsv
}

refused=0 all=()
row job experiment 'depends on' GPUs 'time limit' 'predicted hours' state
while IFS=$'\t' read -r name exp seed output results folder scores state evaluated hours; do
  arguments=(--config "$config" --exp "$exp" "${more[@]}" --output_dir "$output" --results_dir "$results")
  [ "$seed" = - ] || arguments+=(--seed "$seed")

  depends=() after=- id=-
  read -r running phase < <(job_for "train $folder") || true
  case $state in
    refused:*) row - "$name" - - - - "$state"; refused=1; continue ;;
    complete) row - "$name" - - - - 'complete, skipped' ;;
    *)
      if [ -n "$running" ]; then
        id=$running
        row "$id" "$name" - - - "$hours" "$phase, left alone"
      else
        submit train "$name" "$folder" "$scores" "${train[@]}" slurm/train.sbatch "${arguments[@]}"
        row "$id" "$name" - $((NODES * GPUS)) "$TIME" "$hours" "$state"
      fi
      depends=(--dependency="afterok:$id") after=$id ;;
  esac

  read -r running phase < <(job_for "eval $folder") || true
  if [ -n "$running" ]; then
    row "$running" "$name evaluation" - - - - "$phase, left alone"
    all+=("$running")
  elif [ "$state" = complete ] && [ "$evaluated" = yes ]; then
    row - "$name evaluation" - - - - 'complete, skipped'
  else
    # From the folder above the seeds', so that all of them share the base's scores.
    [ "$seed" = - ] || { exp=${output##*/}/$exp output=${output%/*} results=${results%/*}; }
    EVALUATED=$scores/evaluated submit eval "$name-eval" "$folder" "$scores" "${score[@]}" "${depends[@]}" \
      slurm/eval.sbatch --config "$config" --exp "$exp" "${more[@]}" --output_dir "$output" --results_dir "$results"
    row "$id" "$name evaluation" "$after" 1 "$EVAL_TIME" - new
    all+=("$id")
  fi
done <<<"$plan"

if [ ${#all[@]} -gt 0 ]; then
  after=$(IFS=:; echo "${all[*]}")
  earlier=$(job_for "report $PWD" | cut -d ' ' -f 1) # it would not wait for what is new
  if [ -n "$earlier" ] && [ -z "$dry" ]; then scancel "$earlier"; fi
  submit report report "$PWD" "$PWD" --partition="$PARTITION" --mem="$EVAL_MEM" --time="$EVAL_TIME" \
    --dependency="afterany:$after" --wrap "$(printf '%q ' "${python[@]}" report.py --config "$config" "${more[@]}")"
  row "$id" report 'all of these' 0 "$EVAL_TIME" - new
fi
if [ -n "$dry" ]; then
  echo 'DRY: nothing was submitted'
else
  echo 'make status shows how far they are; make logs EXP=…; make cancel'
fi
exit $((refused * 2))
