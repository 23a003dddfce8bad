# `make` alone prints every target.  The first target that needs packages builds .venv from requirements.txt (tools/env.sh);
# where pixi is found, its environment is used instead (another one: make … PIXI_ENV=cu128).
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help
.PHONY: help env smoke demo train eval eval-baselines chat merge push serve report power data-report fetch preflight cluster-sweep status logs cancel \
  plan bench test test-all lint lock build-image sif upload test-images clean FORCE

# Variables are read in the shell ("$$EXP"), where each is one word and nothing of it is run; make takes them as they stand.
define as-given
override $(1) := $$(value $(1))
export $(1)
endef
GIVEN := $(foreach name,$(.VARIABLES),$(if $(filter command,$(firstword $(origin $(name)))),$(name)))
$(foreach name,$(GIVEN),$(eval $(call as-given,$(name))))
MAKEOVERRIDES :=

# A target takes what stands in capitals before a "=" in its line, those below that use a cluster its settings too, and
# all of them what programs read from the environment.
GOALS := $(or $(MAKECMDGOALS),help)
TAKEN := $(shell awk -F: '/^[a-z.-]+:/ {n = split($$0, part, "="); \
  for (i = 1; i < n; i++) if (match(part[i], /[A-Z_]+$$/)) print $$1 "/" substr(part[i], RSTART)}' Makefile)
TAKEN := $(foreach goal,$(GOALS),$(patsubst $(goal)/%,%,$(filter $(goal)/%,$(TAKEN))))
ifneq ($(filter fetch preflight cluster-sweep status logs cancel,$(GOALS)),)
TAKEN += $(shell sed -n 's/^: "$${\([A-Z_]*\):=.*/\1/p' slurm/site.env.example)
endif
ifeq ($(value EXP),smoke)  # what `make smoke` trained and scored
export CONFIG ?= configs/smoke.yaml
export RESULTS_DIR ?= results/make-smoke
TAKEN += $(if $(filter report,$(GOALS)),EXP)
endif
UNKNOWN := $(filter-out $(TAKEN) PYTHON PIXI_ENV ENV PY OUTPUT_DIR RESULTS_DIR REPORT_TO TOTAL_UT_STEPS TOKENIZERS_PARALLELISM \
  TMPDIR %_proxy %_PROXY $(addsuffix _%,HF JUDGE ENDPOINT WANDB CUDA NCCL OMP SBATCH SLURM TORCH),$(GIVEN))
ifneq ($(UNKNOWN),)
$(error make $(GOALS) does not take $(UNKNOWN). It takes $(or $(sort $(TAKEN)),nothing)$(if $(filter ARGS,$(TAKEN)), (settings: ARGS="--learning_rate 1e-4")))
endif

train eval eval-baselines chat merge push serve data-report fetch preflight: export CONFIG ?= configs/default.yaml
cluster-sweep bench: export CONFIG ?= configs/a100.yaml
smoke: export CONFIG ?= configs/smoke.yaml
export PYTHON ?= python3
export TOKENIZERS_PARALLELISM ?= false

ifdef PIXI_ENVIRONMENT_NAME  # inside `pixi run`
ENV := :
PY := python
PYTHON_BIN := python
else ifneq ($(shell command -v pixi),)
export PIXI_ENV ?= default
ENV := $(MAKE) --no-print-directory pixi.lock && pixi install --quiet --locked --environment "$$PIXI_ENV"
PY := pixi run --frozen --environment "$$PIXI_ENV" python
PYTHON_BIN := .pixi/envs/$(value PIXI_ENV)/bin/python
else
ENV := tools/env.sh "$$PYTHON"
PY := .venv/bin/python
PYTHON_BIN := .venv/bin/python
endif
export PYTHON_BIN
SITE := . slurm/site.sh && { [ -n "$$IMAGE" ] || $(ENV); }
COMMIT = $(shell git describe --always --dirty --abbrev=40 --exclude '*' 2>/dev/null || echo unknown)
MORE = $${ARGS:+--args="$$ARGS"}
EVAL = $${UT:+--ut_steps "$$UT"} $${BENCH:+--tasks "$$BENCH"} $${SUBSETS:+--subsets "$$SUBSETS"} $${LIMIT:+--limit "$$LIMIT"} $${JUDGE:+--judge "$$JUDGE"} $(MORE)
flag = $(if $(filter-out 0,$(value $(1))),$(2))
need-exp = $(if $(value EXP),,$(error name an experiment: make $@ EXP=exp2-wangchan-ut1 (all of them: configs/experiments.yaml)))

help:  ## print this list
	@awk -F ':.*## ' '/^[a-z.-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' Makefile

env:  ## build the Python environment (3 GB download, 6 GB on disk); harmless to repeat
	@$(ENV)

SMOKE = --output_dir "$${OUTPUT_DIR:-output/smoke}" --results_dir "$${RESULTS_DIR:-results/make-smoke}"

smoke: env  ## train 10 steps and score, on the embedded model and data (CONFIG=configs/default.yaml: the real ones) [ARGS="…"]
	@[[ -n "$${RESULTS_DIR:-}" || "$${ARGS:-}" = *--results_dir* ]] || rm -rf results/make-smoke
	@$(PY) train_qlora.py $(SMOKE) --max_steps 10 --logging_steps 1 --report_to none --overwrite $(MORE)
	@$(PY) evaluate.py $(SMOKE) --tasks thai_exam,thai_text,english_text --limit 3 $(MORE)
	@echo "next: make report EXP=smoke, make chat EXP=smoke, make merge EXP=smoke; or make demo: the whole study in miniature"

demo: env  ## the whole study in miniature, on CPUs, with DEMO_SEEDS=1 in a third of the time [ARGS="…"]
	@$(PY) tools/demo.py $(MORE)

train: env  ## train an experiment: make train EXP=exp2-wangchan-ut1 [DATASET_PATH=… (with EXP=own-ut4) DATASET=… CONFIG=configs/a100.yaml ARGS="--learning_rate 1e-4"]
	@$(need-exp)$(PY) train_qlora.py --exp "$$EXP" $${DATASET:+--dataset "$$DATASET"} $${DATASET_PATH:+--dataset_path "$$DATASET_PATH"} $(MORE)

eval: env  ## score trained experiments and their base: make eval EXP=exp2-wangchan-ut1[,…] [UT=1,2,3,4 BENCH=thai_exam,… SUBSETS=onet,… LIMIT=N JUDGE=none CONFIG=… ARGS="…"]
	@$(need-exp)$(PY) evaluate.py --exp "$$EXP" $(EVAL)

eval-baselines: env  ## score the baselines of configs/evals.yaml, or one [MODEL=typhoon2-3b UT=… BENCH=… SUBSETS=… LIMIT=N JUDGE=none CONFIG=… ARGS="…"]
	@all=$$($(PY) -c 'from ouro.evaluate import benchmarks; print(*benchmarks.table()["baselines"])'); \
	if [ -n "$${MODEL:-}" ]; then set -- "$$MODEL"; else set -- $$all; fi; \
	for model; do $(PY) evaluate.py --model "$$model" $(EVAL) || failed="$${failed:-} $$model"; done; \
	if [ -n "$${failed:-}" ]; then echo "error: not scored:$$failed" >&2; exit 2; fi

report: env  ## the answer from all runs and scores there are: RESULTS.md, report.html [SERVE=1, a page that follows a sweep; OUT=. CONFIG=… OUTPUT_DIR=… RESULTS_DIR=… ARGS="--csv --latex"]
	@$(PY) report.py --out "$${OUT:-.}" $(call flag,SERVE,--serve) $(MORE)

power: env  ## what a study can find, by seeds and items: the smallest difference found four times in five [OUT=. ARGS="…"]
	@$(PY) report.py --power --out "$${OUT:-.}" $(MORE)

chat: env  ## talk to a trained experiment, at any depth: make chat EXP=exp2-wangchan-ut1 [CONFIG=… ARGS="…"]
	@$(need-exp)$(PY) tools/chat.py --exp "$$EXP" $(MORE)

EXPORT = $(PY) tools/export.py $@ --exp "$$EXP" $${UT:+--total_ut_steps "$$UT"} $(MORE)

merge: env  ## write a trained experiment as one bf16 model: make merge EXP=exp2-wangchan-ut1 [UT=2 CONFIG=… ARGS="…"]
	@$(need-exp)$(EXPORT)

push: env  ## upload its adapter, private: make push EXP=exp2-wangchan-ut1 REPO=me/name [MERGED=1 PUBLIC=1 UT=2 CONFIG=… ARGS="…"]
	@$(need-exp)$(EXPORT) $${REPO:+--repo "$$REPO"} $(call flag,MERGED,--merged) $(call flag,PUBLIC,--public)

serve: env  ## print the vLLM command for it, or run it: make serve EXP=exp2-wangchan-ut1 [RUN=1 UT=2 CONFIG=… ARGS="…"]
	@$(need-exp)$(EXPORT) $(call flag,RUN,--run)

data-report: env  ## check a training set, show what would be trained: make data-report DATASET=wangchan [DATASET_PATH=… CONFIG=… ARGS="…"]
	@$(PY) data_config.py --dataset "$${DATASET:-wangchan}" $${DATASET_PATH:+--dataset_path "$$DATASET_PATH"} $(MORE)

fetch:  ## download model, training sets and benchmarks for jobs without a network [CONFIG=… ONLY=wangchan,thai_exam ARGS="…"]
	@$(SITE) && HF_HUB_OFFLINE= "$${python[@]}" -m ouro.data.fetch $${ONLY:+--only "$$ONLY"} $(MORE)

preflight:  ## check what a job needs, a line each; GPU=1: one real step too [CONFIG=… EXP=… GPU=1 ARGS="…"]
	@$(SITE) && SLURM_SAYS=$$(slurm_says) "$${python[@]}" -m ouro.cluster.preflight $${EXP:+--exp "$$EXP"} $(call flag,GPU,--gpu) $(MORE)

cluster-sweep:  ## submit the study to Slurm; harmless to repeat [STUDY=core|english|flops|rates|tuned|rank|quant|control EXPS="…" CONFIG=configs/a100.yaml SEEDS="0 1 2" DRY=1 ARGS="…"]
	@$(if $(value EXP),$(error cluster-sweep submits several: make $@ EXPS="$(value EXP)"))$(SITE) && slurm/run_experiments.sh

status:  ## how far each submitted experiment is, and why one failed
	@$(SITE) && queue=$$(live_jobs) && "$${python[@]}" -m ouro.cluster.status <<<"$$queue"

logs:  ## the end of an experiment's newest log: make logs EXP=exp2-wangchan-ut1
	@$(need-exp)newest=$$(ls -t slurm/logs/*_"$$EXP"*.out 2>/dev/null | head -n 1) || { echo "error: no log of $$EXP in slurm/logs" >&2; exit 2; }; \
	tail -v -n 40 "$$newest" "$${newest%.out}.err"

cancel:  ## cancel what was submitted from here and has not ended [EXP=…]
	@$(if $(value EXPS),$(error cancel takes one: make $@ EXP=exp2-wangchan-ut1, or none for all))
	@. slurm/site.sh && queue=$$(live_jobs) && \
	jobs=$$(HERE=$$PWD EXP=$${EXP:+/$$EXP} awk -F '\t' '$$5 == ENVIRON["HERE"] && substr($$4, length($$4) - length(ENVIRON["EXP"]) + 1) == ENVIRON["EXP"] \
	  {print $$1}' <<<"$$queue") && \
	if [ -n "$$jobs" ]; then scancel $$jobs && echo "cancelled:" $$jobs; else echo "nothing to cancel"; fi

plan: env  ## what the study costs, in hours and disk; what fits a weekend: make plan GPU=RTX3080 HOURS=48 [COUNT=4 STUDY=core CONFIG=… ARGS="…"]
	@$(PY) -m ouro.cluster.hours $${GPU:+--gpu "$$GPU"} $${COUNT:+--count "$$COUNT"} $${STUDY:+--study "$$STUDY"} $${HOURS:+--hours "$$HOURS"} $(MORE)

bench: env  ## speed and memory, measured: make bench WHAT=train [CONFIG=configs/a100.yaml ARGS="…"]; more: tools/bench.py
	@$(PY) tools/bench.py "$${WHAT:-train}" $(MORE)

PYTEST := $(PY) -m pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

test: env  ## run what holds the product together: about five minutes on two cores
	@$(PY) -m ruff check .
	@$(PYTEST) -m 'not slow'

test-all: test  ## run the slow tests too: real Slurm, kills, several processes, the demo, browser, compilers
	@$(PYTEST) -m slow

lint: env  ## ruff alone
	@$(PY) -m ruff check .

lock:  ## resolve requirements.in into requirements.txt, pixi.lock.in and the versions of pixi.toml
	@tools/env.sh "$$PYTHON"
	@.venv/bin/uv pip compile --quiet --universal --python-version 3.11 --no-annotate --generate-hashes \
	  --custom-compile-command "make lock" requirements.in -o requirements.txt >/dev/null
	@.venv/bin/python tools/lock.py

pixi.lock: pixi.lock.in $(if $(value PYPI_INDEX)$(value PYPI_FILES),FORCE)  ## render pixi.lock.in, for a mirror too [PYPI_FILES=https://… PYPI_INDEX=…]
	@pip() { "$$PYTHON" -c "from pip._internal.models.index import PyPI; print($$1)" 2>/dev/null || \
	  { echo "error: $$PYTHON has no pip, which knows PyPI's addresses: give PYPI_INDEX and PYPI_FILES" >&2; exit 2; }; }; \
	index=$${PYPI_INDEX:-$$(pip PyPI.simple_url)}; files=$${PYPI_FILES:-https://$$(pip PyPI.file_storage_domain)}; \
	sed "s|@PYPI_INDEX@|$$index|; s|@PYPI_FILES@|$$files|" $< >$@

build-image:  ## build the Docker image ouro-thai (run.sh runs it)
	@./run.sh build

sif:  ## build ouro-thai.sif from singularity.def, for clusters [APPTAINER=…]
	@read -rd "" -a builder <<<"$${APPTAINER:-$$(command -v apptainer || command -v singularity || :)}" || true; [ -n "$${builder:-}" ] || { \
	  echo "neither apptainer nor singularity is here; build the image elsewhere and make upload HOST=…" >&2; exit 2; }; \
	"$${builder[@]}" build --force --build-arg COMMIT=$(COMMIT) ouro-thai.sif singularity.def

upload:  ## copy code, history and ouro-thai.sif to a cluster; goes on where it stopped: make upload HOST=me@cluster [DIR=ouro-thai]
	@$(if $(value HOST),,$(error name the machine: make upload HOST=me@cluster [DIR=ouro-thai]))
	@rsync -azs --filter=':- .gitignore' -- ./ "$$HOST:$${DIR:-ouro-thai}/"
	@if [ -e ouro-thai.sif ]; then rsync -avs --partial-dir=.rsync-partial --info=progress2 -- ouro-thai.sif "$$HOST:$${DIR:-ouro-thai}/"; fi

test-images:  ## build and run the images for real, on a Debian base (root; 20 to 30 minutes on two cores, 30 GB)
	@tests/images/run

clean:  ## delete the environment, the cache of tokenised rows and what smoke wrote; runs and results stay
	@rm -rf .venv cache output/smoke/smoke results/make-smoke
