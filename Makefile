# The project's commands; `make` lists them.
#
# They use the active conda environment if there is one (a base environment only if TensorFlow is
# in it), else .venv, which `make setup` builds from a lock file with uv, or without it with pip.
#
#   make setup EXTRA=gpu              choose the lock file: cpu or gpu
#   make setup PYTHON=/path/to/python choose the interpreter that .venv is built with

.DEFAULT_GOAL := help
.PHONY: help setup demo course app test test-style test-lib test-notebooks test-long backends cluster
.PHONY: hub test-cluster browser notebooks screenshots lab tensorboard report lint lock clean
.PHONY: active-conda rehearse book test-training test-search test-studies test-solutions

# Notebooks run on this environment's kernel, never on one registered under the same name elsewhere.
unexport JUPYTER_PATH
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# TensorFlow is chatty, and what it says would stand in the notebooks' outputs.
notebooks app tensorboard: export TF_CPP_MIN_LOG_LEVEL := 3

# An existing .venv stays what it is; a new one gets CUDA where there is a GPU that TensorFlow can use.
ifndef EXTRA
EXTRA := $(patsubst .venv/.stamp-%,%,$(firstword $(wildcard .venv/.stamp-*)))
endif
ifeq ($(EXTRA),)
EXTRA := $(shell [ "`uname -sm`" = "Linux x86_64" ] && nvidia-smi -L >/dev/null 2>&1 && echo gpu || echo cpu)
endif
ifeq ($(filter cpu gpu,$(EXTRA)),)
$(error EXTRA must be cpu or gpu, not '$(EXTRA)')
endif
LOCK := $(if $(filter gpu,$(EXTRA)),requirements-gpu.lock,requirements.lock)

HAS_TENSORFLOW := import importlib.util as u, sys; sys.exit(u.find_spec("tensorflow") is None)
CONDA_ACTIVE := $(shell [ -n "$$CONDA_PREFIX" ] && [ -x "$$CONDA_PREFIX/bin/python" ] && \
	{ [ "$$CONDA_DEFAULT_ENV" != base ] || "$$CONDA_PREFIX/bin/python" -c '$(HAS_TENSORFLOW)'; } && \
	echo yes)
ifeq ($(CONDA_ACTIVE),yes)
BIN := "$$CONDA_PREFIX/bin"
ENVIRONMENT := active-conda
else
BIN := .venv/bin
ENVIRONMENT := .venv/.stamp-$(EXTRA)
endif
PY := $(BIN)/python

# Sets $$py to the first interpreter that is new enough and really runs (a pyenv shim may exist for
# a version that is not active, and fail).
FIND_PYTHON = found=; py=; \
	for name in "$(PYTHON)" python3.13 python3.12 python3.11 python3 python; do \
	  version=`"$$name" -c 'import platform; print(platform.python_version())' 2>/dev/null` || continue; \
	  case $$version in \
	    3.11.*|3.12.*|3.13.*) py=$$name; break;; \
	    *) found="$$found $$name ($$version)";; \
	  esac; \
	done; \
	if [ -z "$$py" ]; then \
	  echo "setup: this project needs Python 3.11, 3.12 or 3.13. Found:$${found:- no Python at all}." >&2; \
	  echo "setup: install one, or name it: make PYTHON=/path/to/python3.12 ..." >&2; \
	  exit 1; \
	fi

help: ## List these commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' Makefile

# `import lib` must mean this folder from everywhere (-I: not just because we stand in it).
setup: $(ENVIRONMENT) ## Build .venv from the lock file, or check the active conda environment
	@$(PY) -I -c 'import importlib.util as u, os, sys; spec = u.find_spec("lib"); \
	  sys.exit(not spec or os.path.realpath(spec.origin or "") != os.path.realpath("lib/__init__.py"))' || \
	$(PY) -m pip install --quiet --no-deps --editable . || { \
	  echo "setup: installing this project itself failed, see above. Is a package index reachable?" >&2; \
  echo "setup: 'make clean' removes .venv, and the next make builds it anew." >&2; \
	  exit 1; }

active-conda:
	@$(PY) -c '$(HAS_TENSORFLOW)' || { \
	  echo "setup: the active conda environment ($$CONDA_PREFIX) has no TensorFlow. Activate the one" >&2; \
	  echo "setup: of environment.yml, or run 'conda deactivate' to let make build .venv." >&2; \
	  exit 1; }

# uv installs in half a minute what takes pip some minutes. It does not read pip's settings (another
# index, for instance), so pip has a try where uv fails.
define INSTALL
{ command -v uv >/dev/null 2>&1 && uv pip install --quiet --python .venv/bin/python $(1); } || \
.venv/bin/python -m pip install --quiet $(1)
endef

# Always built from scratch: the packages of the two lock files must never mix. The stamp comes last,
# so a set-up that failed or was interrupted starts anew.
# With uv, what is locked is compiled at once, by all cores, and not by the first notebook.
.venv/.stamp-$(EXTRA): export UV_COMPILE_BYTECODE := 1
.venv/.stamp-$(EXTRA): $(LOCK)
	@$(FIND_PYTHON); \
	echo "setup: building .venv with Python $$version from $(LOCK): about 3 GB (with CUDA more), some minutes"; \
	rm -rf .venv; \
	{ command -v uv >/dev/null 2>&1 && \
	  uv venv --quiet --seed --python `"$$py" -c 'import sys; print(sys.executable)'` .venv; } || \
	{ "$$py" -c 'import ensurepip' && "$$py" -m venv --clear .venv; } || { \
	  echo "setup: $$py (Python $$version) cannot build virtual environments: it lacks venv or ensurepip." >&2; \
	  echo "setup: on Debian and Ubuntu: apt install python$${version%.*}-venv" >&2; \
	  exit 1; }; \
	$(call INSTALL,--requirement $(LOCK)) || { \
	  echo "setup: installing $(LOCK) failed, see above. Is a package index reachable?" >&2; \
	  exit 1; }
	@touch $@

demo: setup ## Data, training, GeM, evaluation, app on generated data: notebooks 00-02, 04, 05, 10
	$(PY) -m tools.pipeline --only 00 01 02 04 05 10

course: setup ## Run all notebooks, 00-10, on generated data into runs/
	$(PY) -m tools.pipeline

real: setup ## One shard of real photos (some 300 MB, fetched from Kaggle) through notebooks 01-05
	$(PY) -m tools.download --dataset-dir Dataset/slice --shards 0
	$(PY) -m tools.pipeline profiles/real_slice.yaml --only 01 02 03 04 05

app: setup ## Search with a photo in a page for this machine alone; PHOTOS=~/Pictures: in your own photos
	$(PY) -m lib.app.page $(if $(PHOTOS),--photos '$(subst ','\'',$(PHOTOS))')

# conftest.py and pyproject.toml hold the options of all these. 04 to 08 and 10 use the model that 02
# trained: the order matters. 00 to 07 must reproduce their saved outputs, but for what a training or
# a clock decides; a folder of photos (08, 09) and the app (10) must run.
PYTEST := $(PY) -m pytest
test: test-style test-lib test-notebooks ## Check style, run the quick tests and the notebooks
ifneq ($(filter test,$(MAKECMDGOALS)),)
# With -j, all these side by side: each waits now and then.
test-long test-cluster test-training book: | test-lib
endif

# Which module may import which: the contracts are in pyproject.toml.
LINT_IMPORTS := $(BIN)/lint-imports --no-cache --no-logo
LINT_WORKFLOWS := $(BIN)/check-jsonschema --builtin-schema vendor.github-workflows \
	.github/workflows/ci.yml .github/workflows/conda.yml .github/workflows/pages.yml
test-style: setup
	@echo "== style"
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(LINT_IMPORTS)
	$(LINT_WORKFLOWS)

test-lib: setup
	@echo "== tests"
	$(PYTEST)

test-long: setup ## Run the long tests: kills, training, a real browser
	@echo "== long tests"
	$(PYTEST) -m long --ignore=tests/cluster --durations=25

rehearse: setup ## Walk the paths of users from end to end: half an hour
	$(PYTEST) -m rehearsal tests/notebooks/test_rehearsals.py

# After 02, two rows that share its run and no results: with -j, side by side.
test-notebooks: test-training test-search test-studies
test-search test-studies: | test-training
NUMBERED = $(foreach number,$(1),notebooks/$(number)*.ipynb)

test-training: setup
	@echo "== notebook 02, compared with its saved outputs"
	$(PYTEST) --nbval $(call NUMBERED,02)

test-search: setup
	@echo "== notebooks 04, 05 and 07, compared with their saved outputs; 10, run"
	$(PYTEST) --nbval $(call NUMBERED,04 05 07)
	$(PYTEST) --nbval-lax $(call NUMBERED,10)

test-studies: setup
	@echo "== notebooks 00, 01, 03 and 06, compared with their saved outputs; 08 and 09, run"
	$(PYTEST) --nbval $(call NUMBERED,00 01 03 06)
	$(PYTEST) --nbval-lax $(call NUMBERED,08 09)

# Those of 02, 04 to 07 and 10 read a run of the demo.
test-solutions: setup ## Run the solutions to the exercises, after make demo: about four minutes
	$(PYTEST) --nbval-lax notebooks/solutions/*.ipynb

# For Linux, PyPI's PyTorch holds gigabytes of CUDA; PyTorch's own index has a build without. With pip:
#   PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu make backends
# and with uv:
#   UV_TORCH_BACKEND=cpu make backends
backends: .venv/.added-backends ## Add PyTorch to .venv: some tests are skipped without it
.venv/.added-backends: EXTRAS = backends
.venv/.added-backends: MODULES = torch, pytorch_metric_learning

cluster: .venv/.added-cluster ## Add Ray, JAX and Milvus to .venv: training, embedding and search past one machine
.venv/.added-cluster: EXTRAS = cluster,milvus
.venv/.added-cluster: MODULES = ray, jax, pymilvus, milvus_lite

# keras-hub asks for tensorflow-text as well, for its networks of texts, and that for the package
# tensorflow, whose files overwrite those of tensorflow-cpu. So the extra names all that is needed.
hub: .venv/.added-hub ## Add keras-hub to .venv: DINOv2, DINOv3, CLIP and SigLIP 2 as backbones
.venv/.added-hub: WANTED = --no-deps `$(PY) -c '$(LIST_EXTRA)' hub`
.venv/.added-hub: MODULES = keras_hub
LIST_EXTRA := import sys, tomllib; \
	print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"][sys.argv[1]])

book: .venv/.added-book ## Build the course's website into site/: notebooks, texts, a reference of lib
	$(PY) -m tools.book $(if $(REPOSITORY),--repository $(REPOSITORY))
.venv/.added-book: EXTRAS = book
.venv/.added-book: MODULES = sphinx, myst_nb, sphinx_book_theme

# The constraint keeps every locked package at its version.
WANTED = --constraint $(LOCK) --editable '.[$(EXTRAS)]'
.venv/.added-backends .venv/.added-cluster .venv/.added-hub .venv/.added-book: pyproject.toml | setup
	@[ "$(CONDA_ACTIVE)" != yes ] || { \
	  echo "make $(subst .venv/.added-,,$@) is for .venv only: run 'conda deactivate' first." >&2; \
	  exit 1; }
	@$(call INSTALL,$(WANTED))
	$(PY) -c 'import $(MODULES)'
	@touch $@

test-cluster: cluster ## Run what needs Ray and Milvus: several processes, kills, notebook 11
	$(PYTEST) -m long tests/cluster --durations=5
	$(PYTEST) --nbval-lax $(call NUMBERED,11)

# Debian's Chromium brings the libraries that it needs. Elsewhere, or without the rights to install
# it, Playwright's own goes into the user's cache. The last step says whether one really starts.
browser: setup ## Get Chromium if there is none: some tests are skipped without it
	@$(PY) tests/chromium.py || { \
	  sudo=; [ "`id -u`" = 0 ] || sudo="sudo -n"; \
	  command -v apt-get >/dev/null 2>&1 && \
	  echo "browser: installing the system's package chromium" && \
	  $$sudo apt-get update -qq && \
	  $$sudo apt-get install -qq -y --no-install-recommends chromium fonts-dejavu-core && \
	  $(PY) tests/chromium.py; \
	} || { \
	  echo "browser: fetching Playwright's Chromium instead" && \
	  $(PY) -m playwright install chromium && \
	  $(PY) tests/chromium.py; \
	} || { \
	  echo "browser: no Chromium that starts, see above. If libraries are missing:" >&2; \
	  echo "browser: sudo $(PY) -m playwright install-deps chromium" >&2; \
	  exit 1; }

# As pytest would run them: otherwise a kernel hides what libraries write to stderr, and nbval, which
# sees it, would find the saved outputs wanting.
# Without notebook 11, which needs `make cluster`: make notebooks NOTEBOOKS=notebooks/11*.ipynb
NOTEBOOKS ?= $(filter-out notebooks/11%,$(sort $(wildcard notebooks/*.ipynb)))
notebooks: setup ## Run the notebooks and save their outputs in place (before a commit)
	PYTEST_CURRENT_TEST=1 $(PY) -m nbconvert --to notebook --execute --inplace \
	  --ExecutePreprocessor.record_timing=False \
	  --ExecutePreprocessor.store_widget_state=False $(NOTEBOOKS)
	$(PY) -m nbconvert --coalesce-streams --inplace $(NOTEBOOKS)  # of a progress bar, one line
	$(PY) -m ruff format notebooks

screenshots: setup ## Take the README's pictures from the newest run (needs a browser)
	$(PY) -m tests.screenshots

lab: setup ## Open the notebooks in JupyterLab
	$(PY) -m jupyterlab --ServerApp.root_dir=. --LabApp.default_url=/lab/tree/notebooks

tensorboard: setup ## Look at the training curves of all runs in TensorBoard
	$(PY) -m tensorboard.main --logdir runs

report: setup ## Write report.html, one page about the newest run, anew
	$(PY) -m tools.report

lint: setup ## Check imports and workflows, and bring code and notebooks into the common style
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .
	$(LINT_IMPORTS)
	$(LINT_WORKFLOWS)

# Keeps what is locked where it still fits; delete the lock files first to move to new versions.
COMPILE := pip compile --quiet --universal --python-version 3.11 --no-annotate \
	--custom-compile-command "make lock" pyproject.toml --extra test
lock: ## Resolve pyproject.toml into both lock files (with uv, fetched if absent)
	@if command -v uv >/dev/null 2>&1; then uv=uv; else \
	  $(FIND_PYTHON); tmp=`mktemp -d` && trap 'rm -rf "$$tmp"' EXIT && \
	  "$$py" -m venv "$$tmp" && "$$tmp/bin/python" -m pip install --quiet uv && uv=$$tmp/bin/uv || exit 1; \
	fi; \
	"$$uv" $(COMPILE) --extra cpu --output-file requirements.lock && \
	"$$uv" $(COMPILE) --extra gpu --constraint requirements.lock --output-file requirements-gpu.lock

clean: ## Remove .venv and caches (never runs/, Dataset/ or Test_set/)
	rm -rf .venv .pytest_cache .ruff_cache .hypothesis
	find lib tools notebooks tests benchmarks \( -name __pycache__ -o -name .ipynb_checkpoints \) \
	  -prune -exec rm -rf {} +
