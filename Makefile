# The doors of the project. `make demo` and `make test` set up all they need in .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
SOURCES := $(shell git ls-files '*.py' '*.yaml' '*.json' setup.cfg pyproject.toml 2>/dev/null)

.PHONY: demo test test-faults test-matrix test-architectures test-recipes test-plain test-gpu test-slurm test-slurm-as slurm check types install clean

# Runs the library's demo recipe through every stage on this machine's CPU.
demo: $(STAMP)
	$(BIN)/sousbatch submit hangul-restoration

# Tests take the Slurm whose sbatch is on PATH; SLURM=PREFIX puts another's there. SET has values of slurm.conf.
SLURM_ENV = $(if $(SLURM),PATH="$(SLURM)/bin:$$PATH" )SOUSBATCH_TEST_SET="$(SET)" OMP_NUM_THREADS=1
PYTEST = $(SLURM_ENV) $(BIN)/python -P -m pytest -n $(or $(WORKERS),3) --dist loadgroup -q

# The suite runs against the installed wheel, three processes at once, which wait more than they compute; with a private Slurm where there may be one.
test: $(STAMP)
	@sh .ci/install-slurm
	$(PYTEST) $(TESTS)

# The slow faults, each on a private Slurm: some minutes.
test-faults: $(STAMP)
	$(PYTEST) -m faults $(TESTS)

# Every task, method, sharding and precision together, on tiny models: at most 25 minutes.
test-matrix: $(STAMP)
	$(PYTEST) -m "matrix or cell" $(TESTS)

# Every architecture of transformers that a task takes, beside plain transformers: some 15 minutes.
test-architectures: $(STAMP)
	$(PYTEST) -m architectures $(TESTS)

# Recipes drawn at random, 150 of them in some 8 minutes, or those of other seeds: make test-recipes SEEDS=1000-1999
# The same beside plain torch, transformers and peft: make test-plain, or make test-plain SEEDS=1000-1999
test-recipes: $(STAMP)
	$(if $(SEEDS),SOUSBATCH_TEST_SEEDS=$(SEEDS) )$(PYTEST) -m recipes $(or $(TESTS),tests/end_to_end/test_random_recipes.py)
test-plain: $(STAMP)
	$(if $(SEEDS),SOUSBATCH_TEST_SEEDS=$(SEEDS) )$(PYTEST) -m recipes tests/end_to_end/test_plain_training.py

# What needs a GPU, with the Python whose torch knows the card, and the other packages, test tools too: PYTHON=python3
GPU_PYTHON = PYTHONPATH=$(abspath build/as) OMP_NUM_THREADS=1 $(PYTHON)
test-gpu: build/as/sousbatch
	$(GPU_PYTHON) -m pytest -q -rPs -m gpu tests/end_to_end/test_gpu.py tests/jobs/generation/test_engines_contract.py
	@if command -v nvidia-smi > /dev/null; then $(GPU_PYTHON) benchmarks/overhead.py --device gpu --pairs 2; \
	else echo "throughput beside the bare Trainer is left out: no NVIDIA GPU is here"; fi

# What needs a Slurm, on that of a prefix, and with values of slurm.conf: make test-slurm SLURM=DIR SET="KEY=VALUE ..."
test-slurm: $(STAMP)
	$(PYTEST) -m "slurm and not faults" $(or $(TESTS),tests/cluster tests/launchers tests/end_to_end)

# The same as an ordinary user, while Slurm's daemons are root's and its SlurmUser's: root only. make test-slurm-as AS=games
test-slurm-as: $(STAMP)
	$(SLURM_ENV) sh .ci/test-slurm-as $(AS) $(or $(TESTS),tests/launchers tests/end_to_end/test_slurm.py)

# A newer Slurm than Debian's, built into the user's cache: make slurm, or make slurm SOURCE=DIR
slurm:
	@sh .ci/build-slurm $(if $(SOURCE),--source $(SOURCE))

# All that a change must pass: format, lint, types, documentation, tests.
check: $(VENV)/.checks types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(MAKE) test

types: $(VENV)/.checks build/as/sousbatch
	cd build/as && MYPYPATH=. $(abspath $(BIN))/mypy --config-file sousbatch/setup.cfg sousbatch

build/as/sousbatch:
	mkdir -p $(@D) && ln -sfn "$(CURDIR)" $@

# Rebuilt and installed anew when a source has changed; the packages stay.
$(STAMP): $(VENV)/.packages $(SOURCES)
	rm -rf build/lib
	$(BIN)/pip install -q --no-deps --force-reinstall .
	touch $@

$(VENV)/.packages: constraints.txt setup.cfg
	$(PYTHON) -m venv $(VENV)
	rm -rf build/lib
	$(BIN)/pip install -q -c constraints.txt torch
	$(BIN)/pip install -q -c constraints.txt ".[test]"
	touch $@

$(VENV)/.checks: $(STAMP)
	$(BIN)/pip install -q -c constraints.txt mypy ruff types-psutil types-PyYAML
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info
