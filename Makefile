# `make` alone prints every target.  The first target that needs packages builds .venv from requirements.txt (tools/env.sh);
# where pixi is found, its environment is used instead (another one: make … PIXI_ENV=cu128).
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help
.PHONY: help env smoke demo train eval eval-baselines chat merge push serve report data-report fetch preflight cluster-sweep status logs cancel \
  bench test test-all lint lock build-image sif upload test-images clean FORCE

CONFIG ?= configs/default.yaml
PYTHON ?= python3
SMOKE := $(if $(filter file,$(origin CONFIG)),configs/smoke.yaml,$(CONFIG))
export TOKENIZERS_PARALLELISM ?= false

ifdef PIXI_ENVIRONMENT_NAME  # inside `pixi run`
ENV := :
RUN := python
PYTHON_BIN := python
else ifneq ($(shell command -v pixi),)
PIXI_ENV ?= default
ENV := $(MAKE) --no-print-directory pixi.lock && pixi install --quiet --locked --environment $(PIXI_ENV)
RUN := pixi run --frozen --environment $(PIXI_ENV) python
PYTHON_BIN := .pixi/envs/$(PIXI_ENV)/bin/python
else
ENV := tools/env.sh $(PYTHON)
RUN := .venv/bin/python
PYTHON_BIN := .venv/bin/python
endif
export PYTHON_BIN
CLUSTER := $(if $(filter file,$(origin CONFIG)),configs/a100.yaml,$(CONFIG))
SITE := . slurm/site.sh && { [ -n "$$IMAGE" ] || $(ENV); }
COMMIT = $(shell git describe --always --dirty --abbrev=40 --exclude '*' 2>/dev/null || echo unknown)
EVAL = $(if $(UT),--ut_steps $(UT)) $(if $(BENCH),--tasks $(BENCH)) $(if $(SUBSETS),--subsets $(SUBSETS)) $(if $(LIMIT),--limit $(LIMIT)) $(if $(JUDGE),--judge $(JUDGE))
need-exp = $(if $(EXP),,$(error name an experiment: make $@ EXP=exp2-wangchan-ut1 (all of them: configs/experiments.yaml)))

help:  ## print this list
	@awk -F ':.*## ' '/^[a-z.-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' Makefile

env:  ## build the Python environment (3 GB download, 6 GB on disk); harmless to repeat
	@$(ENV)

smoke: env  ## train 10 steps and score, on the embedded model and data (CONFIG=configs/default.yaml: the real ones)
	@$(RUN) train_qlora.py --config $(SMOKE) --output_dir output/smoke --max_steps 10 --logging_steps 1 --report_to none --overwrite
	@$(RUN) evaluate.py --config $(SMOKE) --output_dir output/smoke --results_dir results/make-smoke --limit 3

demo: env  ## the whole study in miniature, on CPUs: eight minutes on two cores, with DEMO_SEEDS=1 a third of that
	@$(RUN) tools/demo.py

train: env  ## train an experiment: make train EXP=exp2-wangchan-ut1 [CONFIG=configs/a100.yaml]
	@$(need-exp)$(RUN) train_qlora.py --config $(CONFIG) --exp $(EXP)

eval: env  ## score trained experiments and their base: make eval EXP=exp2-wangchan-ut1[,…] [UT=1,2,3,4 BENCH=thai_exam,… SUBSETS=onet,… LIMIT=N CONFIG=…]
	@$(need-exp)$(RUN) evaluate.py --config $(CONFIG) --exp $(EXP) $(EVAL)

eval-baselines: env  ## score the baselines of configs/evals.yaml, or one [MODEL=typhoon2-3b BENCH=… LIMIT=N CONFIG=…]
	@for model in $(or $(MODEL),$$($(RUN) -c 'from ouro.evaluate import benchmarks; print(*benchmarks.table()["baselines"])')); do \
	  $(RUN) evaluate.py --config $(CONFIG) --model $$model $(EVAL) || failed="$${failed:-} $$model"; done; \
	if [ -n "$${failed:-}" ]; then echo "error: not scored:$$failed" >&2; exit 2; fi

report: env  ## the answer from all runs and scores there are: RESULTS.md, report.html [OUT=. OUTPUT_DIR=… RESULTS_DIR=…]
	@$(RUN) report.py --out $(or $(OUT),.) $(if $(RESULTS_DIR),--results_dir $(RESULTS_DIR))

chat: env  ## talk to a trained experiment, at any depth: make chat EXP=exp2-wangchan-ut1 [CONFIG=…]
	@$(need-exp)$(RUN) tools/chat.py --config $(CONFIG) --exp $(EXP)

EXPORT = $(RUN) tools/export.py $@ --config $(CONFIG) --exp $(EXP) $(if $(UT),--total_ut_steps $(UT))

merge: env  ## write a trained experiment as one bf16 model: make merge EXP=exp2-wangchan-ut1 [UT=2 CONFIG=…]
	@$(need-exp)$(EXPORT)

push: env  ## upload its adapter, private: make push EXP=exp2-wangchan-ut1 REPO=me/name [MERGED=1 PUBLIC=1 CONFIG=…]
	@$(need-exp)$(EXPORT) $(if $(REPO),--repo $(REPO)) $(if $(MERGED),--merged) $(if $(PUBLIC),--public)

serve: env  ## print the vLLM command for it: make serve EXP=exp2-wangchan-ut1 [UT=2 CONFIG=…]
	@$(need-exp)$(EXPORT)

data-report: env  ## check a training set, show what would be trained: make data-report DATASET=wangchan [DATASET_PATH=… CONFIG=…]
	@$(RUN) data_config.py --config $(CONFIG) --dataset $(or $(DATASET),wangchan) $(if $(DATASET_PATH),--dataset_path $(DATASET_PATH))

fetch:  ## download model, training sets and benchmarks for jobs without a network [CONFIG=… ONLY=wangchan,thai_exam]
	@$(SITE) && HF_HUB_OFFLINE= "$${python[@]}" tools/fetch.py --config $(CONFIG) $(if $(ONLY),--only $(ONLY))

preflight:  ## check what a job needs, a line each; GPU=1: one real step too [CONFIG=… EXP=… GPU=1]
	@$(SITE) && SLURM_SAYS=$$(slurm_says) "$${python[@]}" -m ouro.cluster.preflight --config $(CONFIG) $(if $(EXP),--exp $(EXP)) $(if $(GPU),--gpu)

cluster-sweep:  ## submit the study to Slurm; harmless to repeat [EXPS="…" CONFIG=configs/a100.yaml SEEDS="0 1 2" DRY=1 ARGS="…"]
	@$(if $(EXP),$(error cluster-sweep submits several: make $@ EXPS="$(EXP)"))$(SITE) && CONFIG=$(CLUSTER) slurm/run_experiments.sh

status:  ## how far each submitted experiment is, and why one failed
	@$(SITE) && queue=$$(live_jobs) && "$${python[@]}" -m ouro.cluster.sweep <<<"$$queue"

logs:  ## the end of an experiment's newest log: make logs EXP=exp2-wangchan-ut1
	@$(need-exp)newest=$$(ls -t slurm/logs/*_$(EXP)*.out 2>/dev/null | head -n 1) || { echo "error: no log of $(EXP) in slurm/logs" >&2; exit 2; }; \
	tail -v -n 40 "$$newest" "$${newest%.out}.err"

cancel:  ## cancel what was submitted from here and has not ended [EXP=…]
	@$(if $(EXPS),$(error cancel takes one: make $@ EXP=exp2-wangchan-ut1, or none for all))
	@. slurm/site.sh && queue=$$(live_jobs) && \
	jobs=$$(awk -F '\t' -v here="$$PWD" '$$5 == here && $$4 ~ "$(if $(EXP),/$(EXP)$$)" {print $$1}' <<<"$$queue") && \
	if [ -n "$$jobs" ]; then scancel $$jobs && echo "cancelled:" $$jobs; else echo "nothing to cancel"; fi

bench: env  ## speed and memory: make bench WHAT=train [CONFIG=configs/a100.yaml]; plan, trainer, generate, score: see tools/bench.py
	@$(RUN) tools/bench.py $(or $(WHAT),plan) --config $(CLUSTER)

PYTEST := $(RUN) -m pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

test: env  ## run what holds the product together: under five minutes on two cores
	@$(RUN) -m ruff check .
	@$(PYTEST) -m 'not slow'

test-all: test  ## run the slow tests too: real Slurm, kills, several processes, the demo, browser, compilers
	@$(PYTEST) -m slow

lint: env  ## ruff alone
	@$(RUN) -m ruff check .

lock:  ## resolve requirements.in into requirements.txt, pixi.lock.in and the versions of pixi.toml
	@tools/env.sh $(PYTHON)
	@.venv/bin/python tools/lock.py

pixi.lock: pixi.lock.in tools/lock.py $(if $(PYPI_INDEX)$(PYPI_FILES),FORCE)  ## render pixi.lock.in, for a mirror too [PYPI_FILES=https://… PYPI_INDEX=…]
	@$(PYTHON) tools/lock.py --render $@ $(if $(PYPI_INDEX),--index $(PYPI_INDEX)) $(if $(PYPI_FILES),--files $(PYPI_FILES))

build-image:  ## build the Docker image ouro-thai (run.sh runs it)
	@./run.sh build

sif:  ## build ouro-thai.sif from singularity.def, for clusters
	@builder="$(or $(APPTAINER),$$(command -v apptainer || command -v singularity || :))"; [ -n "$$builder" ] || { \
	  echo "neither apptainer nor singularity is here; build the image elsewhere and make upload HOST=…" >&2; exit 2; }; \
	$$builder build --force --build-arg COMMIT=$(COMMIT) ouro-thai.sif singularity.def

upload:  ## copy code, history and ouro-thai.sif to a cluster; goes on where it stopped: make upload HOST=me@cluster [DIR=ouro-thai]
	@$(if $(HOST),,$(error name the machine: make upload HOST=me@cluster [DIR=ouro-thai]))
	@rsync -az --filter=':- .gitignore' ./ $(HOST):$(or $(DIR),ouro-thai)/
	@if [ -e ouro-thai.sif ]; then rsync -av --partial-dir=.rsync-partial --info=progress2 ouro-thai.sif $(HOST):$(or $(DIR),ouro-thai)/; fi

test-images:  ## build and run the images for real, on a Debian base (root; 20 to 30 minutes on two cores, 30 GB)
	@tests/images/run

clean:  ## delete the environment, the cache of tokenised rows and what smoke wrote; runs and results stay
	@rm -rf .venv cache output/smoke results/make-smoke
