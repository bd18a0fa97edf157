# `make help` says what there is. Nothing has to be activated: every target uses .venv, and makes it first.

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help repro test test-fast test-library test-notebooks test-types faults fuzz lab peers witness docs dream-7b clean check-platform

# A command-line assignment overrides these, e.g. `make test PYTHON=/opt/python3.11/bin/python3.11`.
# PYTHON: the first of these commands that is Python 3.11, or the interpreter behind it if it is a virtual environment's.
OS := $(shell uname -s)
ARCH := $(shell uname -m)
PYTHON = $(shell for name in python3.11 python3 python; do \
	"$$name" -c 'import sys; sys.version_info[:2] == (3, 11) or sys.exit(1); print(sys._base_executable)' 2>/dev/null && exit; \
	done; echo python3)
LAB_ARGS =
FAULTS =
FUZZ_ARGS =
MODEL = random

export OMP_NUM_THREADS := 2
export MKL_NUM_THREADS := 2
export PYTHONHASHSEED := 0
export PYTHONNOUSERSITE := 1
export TOKENIZERS_PARALLELISM := false
export DVC_NO_ANALYTICS := 1
# The only kernel in reach is the one in .venv: neither the user's kernels nor a search path shadow it.
export JUPYTER_PREFER_ENV_PATH := 1
unexport JUPYTER_PATH PYTHONPATH PYTHONHOME

# What is published can be computed without a network; the other targets may download the model that they are given.
repro test test-fast test-library test-notebooks test-types faults fuzz: export HF_HUB_OFFLINE := 1

# Freed memory is kept for what comes next: a tenth of a notebook's time otherwise goes into getting it anew.
KEEP_MEMORY = MALLOC_TRIM_THRESHOLD_=8000000000 MALLOC_MMAP_THRESHOLD_=8000000000
# Before a command: what it starts by name (papermill, python, a kernel) is that of .venv.
IN_VENV = PATH="$$(pwd)/.venv/bin:$$PATH"
# Executed notebooks that read what the ones before them have written, and the rest.
IN_A_ROW = $(sort $(wildcard notebooks/executed/0[1-6]_*.ipynb))
ALONE = $(filter-out $(IN_A_ROW),$(wildcard notebooks/executed/*.ipynb))
PIP_MODULE = -m pip --disable-pip-version-check --no-input
PIP = .venv/bin/python $(PIP_MODULE)
PYTEST = .venv/bin/python -m pytest -p no:cacheprovider
# A worker has all tests of a file, whose models are then made once.
TEST_LIBRARY = OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(PYTEST) -n 2 --dist loadfile --ignore=tests/project/test_notebooks.py

help:
	@echo "make repro   run the pipeline: train, quantize, measure and execute the notebooks, as far as not up to date"
	@echo "make test    run the linter, the tests, the check of types, and the executed notebooks against their stored outputs"
	@echo "make test-fast  run the linter and the tests that take a second or less"
	@echo "make faults  let every file operation of every command that writes fail once (FAULTS=...): nothing may be lost"
	@echo "make fuzz    read 10,000 damaged inputs: all must end in one line (FUZZ_ARGS=--count 500 --seed 1 --kind words)"
	@echo "make docs    make a site of docs/ and of what the docstrings say: artifacts/site"
	@echo "make lab     open JupyterLab with the workbench, on copies of the notebooks (more options: LAB_ARGS=...)"
	@echo "make peers   quantize with the methods of other projects, in .venv-peers, and score them: reports/peers.json"
	@echo "make witness ask the study's questions of a second model, which is downloaded: reports/witness.json"
	@echo "make dream-7b  quantize and run a checkpoint of Dream 7B's size (MODEL=random, a folder or a hub id)"
	@echo "make clean   remove .venv, .venv-peers, the caches of the tools and the build leftovers; results stay"
	@echo "Each of the first eight makes .venv from requirements.lock first, where it is missing or out of date."

repro: .venv/.stamp
	$(IN_VENV) $(KEEP_MEMORY) .venv/bin/dvc repro
	.venv/bin/python -m thermo_lib.prose
	.venv/bin/python docs/figures/draw.py

test: .venv/.stamp
	$(IN_VENV) .venv/bin/ruff check .
	$(IN_VENV) .venv/bin/ruff format --check .
	$(MAKE) --no-print-directory --jobs=2 --output-sync=line test-library test-notebooks test-types

# Side by side, since each leaves a core idle at times; a thread that waits for another leaves its core to the rest.
# Types are checked on the core that is free first.
test-library: .venv/.stamp
	$(IN_VENV) $(TEST_LIBRARY)

test-types: .venv/.stamp
	$(IN_VENV) .venv/bin/mypy

test-fast: .venv/.stamp
	$(IN_VENV) .venv/bin/ruff check .
	$(IN_VENV) $(TEST_LIBRARY) -m "not slow"

test-notebooks: export OMP_WAIT_POLICY := PASSIVE
test-notebooks: .venv/.stamp
	$(IN_VENV) $(KEEP_MEMORY) $(PYTEST) --nbval --nbval-current-env $(IN_A_ROW)
	$(IN_VENV) $(KEEP_MEMORY) $(PYTEST) -n 2 --dist loadfile --nbval --nbval-current-env $(ALONE)
	$(IN_VENV) $(PYTEST) tests/project/test_notebooks.py

# It takes half an hour; FAULTS="--some 100 --seed 1" draws so many, and FAULTS=point is one command.
faults: .venv/.stamp
	$(IN_VENV) PYTHONPATH="$$(pwd)" .venv/bin/python tests/files/faults.py $(FAULTS)

fuzz: .venv/.stamp
	$(IN_VENV) OMP_NUM_THREADS=1 .venv/bin/python tests/fuzz/run.py $(FUZZ_ARGS)

docs: .venv/.stamp
	$(IN_VENV) NO_MKDOCS_2_WARNING=1 .venv/bin/mkdocs --quiet build --strict

# What is opened are copies, so that the tracked notebooks stay as they are; the root is the checkout. Of news and new
# versions, which Lab would ask about elsewhere, nothing is shown.
LAB_SETTINGS = .venv/share/jupyter/lab/settings
lab: .venv/.stamp
	@mkdir -p artifacts/lab $(LAB_SETTINGS)
	@echo '{"@jupyterlab/apputils-extension:notification": {"fetchNews": "false", "checkForUpdates": false}}' \
		> $(LAB_SETTINGS)/overrides.json
	@for path in notebooks/*.ipynb; do test -e "artifacts/lab/$${path##*/}" || cp "$$path" artifacts/lab/; done
	@echo "Your copies of the notebooks are in artifacts/lab: delete one to begin again with that of notebooks/."
	$(IN_VENV) .venv/bin/jupyter-lab --LabApp.default_url=/lab/tree/artifacts/lab/workbench.ipynb $(LAB_ARGS)

# What the report has already is kept, and a run that was stopped goes on. For a new one delete artifacts/peers and
# reports/peers.json. Without KEEP_MEMORY HQQ spends most of its time on memory.
peers: .venv/.stamp .venv-peers/.stamp
	.venv-peers/bin/python -m thermo_lib.studies.peers.quantize
	.venv/bin/python -m thermo_lib.studies.peers
	.venv-peers/bin/python -m thermo_lib.studies.peers.quantize --model antiberty
	.venv/bin/python -m thermo_lib.studies.peers --model antiberty
	$(KEEP_MEMORY) .venv-peers/bin/python -m thermo_lib.studies.peers.full_size
	$(KEEP_MEMORY) .venv-peers/bin/python -m thermo_lib.studies.peers.speed

# What the reports have already is kept, and a run that was stopped goes on. For a new one delete reports/witness*.json
# and reports/norms_points.json.
witness: .venv/.stamp
	$(KEEP_MEMORY) .venv/bin/python -m thermo_lib.studies.second_model

# Not a stage of the pipeline: it writes 18 GB and takes 12 minutes. The random checkpoint stays in artifacts/.
dream-7b: .venv/.stamp
	$(IN_VENV) .venv/bin/papermill --cwd . -p model "$(MODEL)" notebooks/dream_7b.ipynb notebooks/executed/dream_7b.ipynb
	$(IN_VENV) .venv/bin/python -m thermo_lib tidy notebooks/executed/dream_7b.ipynb

clean:
	rm -rf .venv .venv-peers .mypy_cache .pytest_cache .ruff_cache .hypothesis build *.egg-info
	find . \( -name .git -o -name .dvc -o -name artifacts \) -prune -o \
		\( -name __pycache__ -o -name .ipynb_checkpoints \) -prune -exec rm -rf {} +

check-platform:
	@version=$$("$(PYTHON)" -c 'import sys; print("%d.%d.%d" % sys.version_info[:3])' 2>/dev/null) || version="(none)"; \
	case "$$version $(OS) $(ARCH)" in \
		3.11.*" Linux x86_64" | 3.11.*" Linux aarch64") ;; \
		*) echo "thermo_lib needs Python 3.11 on Linux x86_64 or aarch64, but found Python $$version on $(OS) $(ARCH)." >&2; \
			exit 1 ;; \
	esac

# Each stamp is written last, so that an interrupted set-up is done again from the start.
.venv/.packages: requirements.lock | check-platform
	@echo "Setting up .venv from requirements.lock: this takes some minutes and some GB of disk."
	@rm -f .venv/.packages .venv/.stamp
	"$(PYTHON)" -m venv --clear .venv
	grep -v "^#" requirements.lock | xargs --max-procs=2 --max-args=32 \
		$(PIP) install -qq --progress-bar off --no-deps --no-compile --use-pep517
	@touch $@

.venv/.stamp: requirements.lock pyproject.toml $(wildcard thermo_lib/integrations/lm_eval_plugin/*) .venv/.packages | check-platform
	@rm -f $@
	$(PIP) install -qq --progress-bar off --no-deps --no-build-isolation -e .
	$(PIP) check
	@touch $@

# Some peers are built from source here, with the compilers of the machine.
.venv-peers/.stamp: thermo_lib/studies/peers/requirements.lock | check-platform
	@echo "Setting up .venv-peers: this takes ten minutes and 2 GB of disk."
	@rm -f $@
	"$(PYTHON)" -m venv --clear .venv-peers
	BUILD_CUDA_EXT=0 .venv-peers/bin/python $(PIP_MODULE) install -qq --progress-bar off --no-deps -r $<
	@touch $@
