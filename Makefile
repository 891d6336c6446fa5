# Two commands on a fresh machine: `make demo` and `make test`. `make` lists the others.
# Works with GNU make 3.81 (macOS) and newer; needs Python 3.11 or newer and a package index.

.DEFAULT_GOAL := help
.PHONY: help demo compare test kills parity reference-losses wheel check docs format setup clean

VENV ?= .venv
BIN := $(VENV)/bin
# Of make parity: PyTorch, peft, the reference harness and llama.cpp, for the CPU.
PARITY ?= .venv-parity
# Where pip also looks for PyTorch: on Linux the package index has it for CUDA (gigabytes);
# TORCH_INDEX=https://download.pytorch.org/whl/cpu has it for the CPU.
TORCH_INDEX ?=
METHODS ?= qlora
MATRIX ?= matrix-tiny
# Slow tests (tests/slow.txt) to run: none, all, or one part of several, as 3/8.
SLOW ?= none
# Test processes side by side, each with one BLAS thread.
JOBS ?= 2
# Tests start hundreds of processes: a machine that forbids bytecode compiles transformers in each.
TEST_ENV := env -u PYTHONDONTWRITEBYTECODE OPENBLAS_NUM_THREADS=1

RECIPES := tinyllama-full tinyllama-lora tinyllama-qlora \
	phi2-full phi2-lora phi2-qlora \
	mistral-lora mistral-qlora llama2-lora llama2-qlora \
	smollm2-full smollm2-lora smollm2-qlora smollm2-dora smollm2-qat distill-smollm2 distill-on-policy-smollm2 \
	smollm2-dpo smollm2-orpo smollm2-kto tinyllama-dpo mistral-dpo \
	smollm2-grpo qwen-coder-grpo \
	sweep-smollm2-lora \
	tailored-arc-easy tailored-arc-challenge tailored-openbookqa tailored-hellaswag \
	tailored-pubmedqa tailored-bioasq \
	tinyllm-arc tinyllm-openbookqa tinyllm-pubmedqa
# Those with teachers.
TAUGHT := distill-% tinyllm-%
.PHONY: $(RECIPES)

help:
	@echo "make demo                fine-tune a real model on bundled data, score before and after"
	@echo "     MODEL=...           another model: hub id or folder"
	@echo "     METHODS=\"lora full\" other methods: lora qlora dora full"
	@echo "make compare             seven variants of a small model, scored and reported: an hour"
	@echo "     MATRIX=matrix-14    another matrix: matrix-7b, matrix-slim, matrix-tinyllm, or a .yaml file"
	@echo "make RECIPE              fine-tune into runs/RECIPE; go on with it if it was stopped"
	@echo "     MODEL=... ARGS=\"train.steps=100 data.path=rows.jsonl\" change it"
	@for recipe in $(RECIPES); do echo "     $$recipe"; done
	@echo "make test                set up and run the tests, but for slow ones: ten minutes"
	@echo "     SLOW=all            slow ones too: three quarters of an hour; SLOW=3/8: one part of eight"
	@echo "make kills               end every command at each of its file operations and events, and go on: an hour"
	@echo "     ARGS=\"--only eval\"  one command; --points 24 --seed 1: so many moments of all"
	@echo "make parity              logits, adapters, scores against PyTorch, llama.cpp: $(PARITY)"
	@echo "make reference-losses    compute the committed losses of tiny runs again"
	@echo "make wheel               build the wheel, install it with pip and uv, run it"
	@echo "make check               formatting, lint and types"
	@echo "make docs                the documentation, as a site in site/"
	@echo "make format              fix formatting and imports"
	@echo "make setup               create $(VENV) with everything the tests and checks need"
	@echo "make clean               remove $(VENV), $(PARITY) and caches; runs/ stays"

demo: $(VENV)/.base
	@$(BIN)/mlx-slim demo --methods "$(METHODS)" $(if $(MODEL),--model "$(MODEL)") $(ARGS)

COMPARISON := runs/$(basename $(notdir $(MATRIX)))
compare: $(VENV)/.base
	@$(BIN)/mlx-slim compare "$(MATRIX)" -o "$(COMPARISON)" \
		$(if $(wildcard $(COMPARISON)/matrix.json),--resume) $(ARGS)

$(RECIPES): $(VENV)/.base
	@$(BIN)/mlx-slim $(if $(filter $(TAUGHT),$@),distill,train) $@ -o "runs/$@" $(if $(wildcard runs/$@/recipe.json),--resume) \
		$(if $(MODEL),"model=$(MODEL)" revision=null) $(ARGS)

test: $(VENV)/.dev
	$(TEST_ENV) $(BIN)/python -m pytest -n $(JOBS) --slow $(SLOW) $(ARGS)

KILLS := $(if $(TMPDIR),$(TMPDIR),/tmp)/mlx-slim-kills
kills: $(VENV)/.dev
	$(TEST_ENV) $(BIN)/python -m tests.support.kill_commands "$(KILLS)" $(ARGS)

# Commit what changes with the reason; tests/test_reference_losses.py compares.
reference-losses: $(VENV)/.dev
	$(TEST_ENV) $(BIN)/python -m tests.support.reference_losses

# A test that skips for lack of PyTorch is a failure here.
parity: $(PARITY)/.done
	MLX_SLIM_PARITY=required OMP_NUM_THREADS=1 $(TEST_ENV) \
		$(PARITY)/bin/python -m pytest -n $(JOBS) tests/parity $(ARGS)

# Installed by pip and by uv into empty environments outside the checkout: minutes, most of them
# downloads.
wheel: $(VENV)/.dev
	rm -rf dist
	$(BIN)/python -c "from hatchling.build import build_wheel; print(build_wheel('dist'))"
	MLX_SLIM_WHEEL=dist $(BIN)/python -m pytest tests/test_wheel.py $(ARGS)

check: $(VENV)/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright --pythonpath $(BIN)/python

# Opens from the disk: site/index.html loads nothing from the network.
docs: $(VENV)/.dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "open site/index.html"

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

setup: $(VENV)/.dev

clean:
	rm -rf "$(VENV)" "$(PARITY)" build dist site .pytest_cache .ruff_cache
	find mlx_slim tests evals -name __pycache__ -type d -prune -exec rm -rf {} +

# ---------------------------------------------------------------------------- the environment

# Modules are compiled when they are first imported: compiling all of them takes half a minute.
INSTALL := -m pip install --quiet --disable-pip-version-check --no-compile \
	--constraint tests/requirements.lock
PIP := $(BIN)/python $(INSTALL)

$(VENV)/.base: pyproject.toml tests/requirements.lock | $(BIN)/python
	@echo "installing mlx-slim into $(VENV) (about a minute)"
	@$(PIP) --editable .
	@touch $@

$(VENV)/.dev: pyproject.toml tests/requirements.lock | $(BIN)/python
	@echo "installing mlx-slim with its test and check tools into $(VENV) (a minute or two)"
	@$(PIP) --editable ".[test,check,docs]"
	@touch $(VENV)/.base $@

$(PARITY)/.done: pyproject.toml tests/requirements.lock tests/parity/requirements.lock | $(PARITY)/bin/python
	@echo "installing mlx-slim, PyTorch, peft, TRL, lm-eval and llama.cpp into $(PARITY) (two minutes, 1.5 GB)"
	@$(PARITY)/bin/python $(INSTALL) --constraint tests/parity/requirements.lock \
		$(if $(TORCH_INDEX),--extra-index-url "$(TORCH_INDEX)") \
		--editable ".[test,parity,bench]" || { \
		echo "error: PyTorch or another peer could not be installed: no parity was tested" >&2; \
		exit 1; }
	@touch $@

# The first Python that is new enough: macOS has an old python3 of its own. PYTHON=... wins.
$(BIN)/python $(PARITY)/bin/python:
	@for python in $(if $(PYTHON),"$(PYTHON)",python3 python3.13 python3.12 python3.11); do \
		command -v "$$python" >/dev/null 2>&1 || continue; \
		"$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || continue; \
		"$$python" -c 'import ensurepip, venv' 2>/dev/null || { \
			echo "error: $$python cannot make virtual environments; install its venv package" \
				"(Debian: apt-get install python3-venv)" >&2; exit 1; }; \
		"$$python" -m venv "$(@:/bin/python=)" && exit 0; \
		rm -rf "$(@:/bin/python=)"; exit 1; \
	done; \
	echo "error: no Python 3.11 or newer found; install one, or say make PYTHON=/path/to/python3" >&2; \
	exit 1
