# Everything a person does here. Each target sets up what it needs: Python 3.11+ and make are enough.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
UV = $(shell command -v uv || echo .tools/bin/uv)
THREADS = OMP_NUM_THREADS=$(or $(OMP_NUM_THREADS),1) TOKENIZERS_PARALLELISM=false

.PHONY: setup demo tiny test test-all test-min lint bench compare lock clean

setup: $(VENV)/.installed

$(VENV)/.installed: requirements.lock pyproject.toml
	@command -v uv >/dev/null || test -x .tools/bin/uv || $(PYTHON) -m pip install --quiet --target .tools uv
	@test -x $(BIN)/python || $(UV) venv --quiet --python "$$(command -v $(PYTHON))" $(VENV)
	@echo "installing the pinned packages (about 5 GB with torch's CUDA build, once) ..."
	@$(UV) pip install --quiet --python $(BIN)/python -r requirements.lock
	@$(UV) pip install --quiet --python $(BIN)/python --no-deps -e .
	@touch $@

# What a user does with a model: make (or bring) data, measure, tune, measure again, ask. About 20 minutes on 2 cores.
D = runs/demo
demo: setup
	$(BIN)/dmllm data make digits --num 6000 --turns 10 --split train --out $(D)/digits-train
	$(BIN)/dmllm data make scenes --num 2000 --split train --seed 1 --out $(D)/scenes-train
	$(BIN)/dmllm eval eval/suites/demo.yaml --model dmllm-tiny --out $(D)/before
	$(BIN)/python train.py data_configs/demo_digits.yaml --output_dir=$(D)/run
	$(BIN)/dmllm eval eval/suites/demo.yaml --model $(D)/run/model --out $(D)/after --against $(D)/before --run $(D)/run
	$(BIN)/dmllm chat $(D)/run/model --image dmllm/assets/examples/digits.png "read the digits."

MIX = --reading 0.15 --large-print 0.25
# The shipped model from nothing: data, tokenizer, training. Hours on 2 cores, minutes on a GPU; stop and repeat freely.
tiny: setup
	$(BIN)/dmllm data make scenes --num 240000 --split train $(MIX) --out runs/data/scenes-train
	$(BIN)/dmllm data make scenes --num 2000 --split val $(MIX) --out runs/data/scenes-val
	$(BIN)/dmllm tokenizer train runs/data/scenes-val/data.json --vocab-size 512 --isolate '[A-Z0-9]' --out runs/tokenizer
	$(BIN)/python train.py data_configs/dmllm_tiny.yaml
	$(BIN)/python train.py data_configs/dmllm_tiny_talk.yaml

test: setup
	@$(THREADS) $(BIN)/python -m pytest -q -n 2 --dist loadfile

test-all: setup
	@$(THREADS) $(BIN)/python -m pytest -q -m "slow or not slow"

# The fast tests on the oldest supported pair, in an environment of its own.
test-min:
	@$(MAKE) --no-print-directory VENV=.venv-min .venv-min/.oldest
	@$(THREADS) .venv-min/bin/python -m pytest -q -n 2 --dist loadfile

.venv-min/.oldest: $(VENV)/.installed
	@$(UV) pip install --quiet --python .venv-min/bin/python "torch==2.11.*" "torchvision==0.26.*" "transformers==5.17.*"
	@touch $@

lint: setup
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/pyright --pythonpath $(BIN)/python

# What benchmarks/README.md says; beside other projects' code with PEERS="--fast-dllm PATH --llada PATH --llada-v PATH".
bench: setup
	@$(THREADS) $(BIN)/python -m benchmarks.decode $(PEERS)
	@$(THREADS) $(BIN)/python -m benchmarks.quality --picture runs/bench/quality.svg
	@$(THREADS) $(BIN)/python -m benchmarks.memory
	@$(THREADS) $(BIN)/python -m benchmarks.batch
	@$(BIN)/python -m dmllm.evaluation.bench

# Paradigms side by side on text, three seeds of each: about an hour on two free cores; it may be stopped and repeated.
# ARGS=--short is done in minutes, to see that it runs; ONLY= compares all of eval/suites/paradigms.yaml, in hours.
ONLY = --studies text repetition --only autoregressive masked "block of 4"
compare: setup
	@$(THREADS) $(BIN)/dmllm compare eval/suites/paradigms.yaml --out runs/compare$(if $(findstring --short,$(ARGS)),-short) $(ONLY) $(ARGS)

# New pins from the ranges in pyproject.toml: names and versions only.
lock:
	@$(UV) pip compile --quiet --universal --python-version 3.11 --extra dev --no-header --no-annotate --no-emit-index-url pyproject.toml -o requirements.lock

clean:
	rm -rf .venv .venv-min .tools .pytest_cache .ruff_cache build dist
