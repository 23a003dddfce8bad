# `make` alone prints every target.  The first target that needs packages builds .venv from requirements.txt (env.sh);
# where pixi and a pixi.toml are found, pixi's environment is used instead.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help
.PHONY: help env smoke train eval data-report fetch bench test lint lock clean

CONFIG ?= configs/default.yaml
PYTHON ?= python3
SMOKE := $(if $(filter file,$(origin CONFIG)),configs/smoke.yaml,$(CONFIG))
export TOKENIZERS_PARALLELISM ?= false

ifneq ($(and $(shell command -v pixi),$(wildcard pixi.toml)),)
ENV := pixi install --quiet
RUN := pixi run --frozen python
else
ENV := ./env.sh $(PYTHON)
RUN := .venv/bin/python
endif
need-exp = $(if $(EXP),,$(error name an experiment: make $@ EXP=exp2-wangchan-ut1 (all of them: configs/experiments.yaml)))

help:  ## print this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' Makefile

env:  ## build the Python environment (3 GB download, 6 GB on disk); harmless to repeat
	@$(ENV)

smoke: env  ## train 10 steps and score, on the embedded model and data (CONFIG=configs/default.yaml: the real ones)
	@$(RUN) train_qlora.py --config $(SMOKE) --output_dir output/smoke --max_steps 10 --logging_steps 1 --report_to none --overwrite
	@$(RUN) evaluate.py --config $(SMOKE) --output_dir output/smoke --results_dir results/smoke

train: env  ## train an experiment: make train EXP=exp2-wangchan-ut1 [CONFIG=configs/a100.yaml]
	@$(need-exp)$(RUN) train_qlora.py --config $(CONFIG) --exp $(EXP)

eval: env  ## score a trained experiment and its base at depths 1 to 4: make eval EXP=exp2-wangchan-ut1 [CONFIG=…]
	@$(need-exp)$(RUN) evaluate.py --config $(CONFIG) --exp $(EXP)

data-report: env  ## check a training set, show what would be trained: make data-report DATASET=wangchan [DATASET_PATH=… CONFIG=…]
	@$(RUN) data_config.py --config $(CONFIG) --dataset $(or $(DATASET),wangchan) $(if $(DATASET_PATH),--dataset_path $(DATASET_PATH))

fetch: env  ## download model, training sets and benchmarks for jobs without a network [CONFIG=… ONLY=wangchan,thai_exam]
	@$(RUN) sources.py --config $(CONFIG) $(if $(ONLY),--only $(ONLY))

bench: env  ## measure: make bench WHAT=data [CONFIG=… ROWS=4000]
	@$(RUN) bench.py $(or $(WHAT),data) --config $(SMOKE) $(if $(ROWS),--rows $(ROWS))

test: env  ## run all tests
	@$(RUN) -m ruff check .
	@$(RUN) -m pytest

lint: env  ## ruff alone
	@$(RUN) -m ruff check .

lock: env  ## resolve requirements.in into requirements.txt again
	@.venv/bin/uv pip compile --quiet --universal --python-version 3.11 --no-annotate --generate-hashes --custom-compile-command "make lock" requirements.in -o requirements.txt

clean:  ## delete the environment, the cache of tokenised rows and what smoke wrote; runs and results stay
	@rm -rf .venv cache output/smoke results/smoke
