# `make demo` and `make test` set up all they need: Python 3.10 or newer and g++ are enough.
#
#   TORCH='torch==2.14.1'   the torch to install, as pip takes it
#   PYTHON=python3.12       the Python that .venv is made from
#   LOCKED=1                everything else as .ci/locks pins it, by version and hash (CI does)
#   FUZZ=20000              examples of each property for make fuzz
#   DEMO='--epochs 5'  PYTEST='-k dropout'  BENCH='--full'   more arguments for each command

PYTHON ?= python3
TORCH ?= torch==2.13.0
DEMO ?=
PYTEST ?=
LOCKED ?=
FUZZ ?= 20000
MUTANTS ?=
BENCH ?=
DOCS ?=

VENV := .venv
RUN := $(VENV)/bin/python
PIP := $(RUN) -m pip --disable-pip-version-check
# One stamp for each TORCH and for LOCKED, so that another one installs again.
NAME := $(shell printf '%s' '$(TORCH)' | tr -c 'A-Za-z0-9.' '-')
READY := $(VENV)/.ready-$(NAME)$(if $(LOCKED),-locked)

.PHONY: demo test bench docs-benchmarks lint format examples abi-check fuzz fuzz-bytes mutants soak \
  reliability asan ubsan tsan barriers lock wheels sbom install-matrix gpu-check clean distclean help
.DEFAULT_GOAL := help

help:
	@echo 'make demo       train a network on real data, eager and fused, and compare the two'
	@echo 'make test       run the tests'
	@echo 'make bench      run the benchmarks'
	@echo 'make docs-benchmarks  measure and rewrite the numbers of docs/benchmarks.md'
	@echo 'make lint       check style and types (make format mends style)'
	@echo 'make examples   run the scripts in examples/ beside the packages they use'
	@echo 'make abi-check  run one wheel under several versions of torch'
	@echo 'make gpu-check  run the smoke tests on a GPU under compute-sanitizer'
	@echo 'make fuzz       check FUZZ random calls of every op against float64, and as many wrong ones'
	@echo 'make fuzz-bytes  call the raw ops with whatever libFuzzer thinks of'
	@echo 'make mutants    plant faults in the numerics and see whether the tests notice (two hours)'
	@echo 'make soak       a million small steps: does anything grow'
	@echo 'make reliability  measure the tables of docs/reliability.md again'
	@echo 'make asan       run the tests over a CPU library built with a sanitizer (also ubsan, tsan)'
	@echo 'make barriers   delete each barrier of the CUDA kernels in turn: does a test notice?'
	@echo 'make wheels     build the source archive and the wheel of a release into dist/'
	@echo 'make sbom       list what an installation of the wheel brings, as CycloneDX, into dist/'
	@echo 'make install-matrix  install in every way, with and without each tool'
	@echo 'make lock       rewrite the lock files of CI'
	@echo 'make clean      remove what was built; make distclean removes .venv as well'

demo: $(READY)
	$(RUN) -m fused_mlp demo $(DEMO)

test: $(READY)
	$(RUN) -m pytest -m 'not slow' --numprocesses auto --maxprocesses 4 $(PYTEST)

bench: $(READY)
	$(RUN) -m bench $(BENCH)

docs-benchmarks: $(READY)
	$(RUN) -m bench docs $(DOCS)

lint: $(READY) $(VENV)/.lint
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	git ls-files 'csrc/*.h' 'csrc/*.cuh' 'csrc/*.cpp' 'csrc/*.cu' \
	  | xargs -r $(VENV)/bin/clang-format --dry-run -Werror
	$(RUN) -m mypy

format: $(READY) $(VENV)/.lint
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .
	git ls-files 'csrc/*.h' 'csrc/*.cuh' 'csrc/*.cpp' 'csrc/*.cu' \
	  | xargs -r $(VENV)/bin/clang-format -i

examples: $(READY) $(VENV)/.examples
	$(RUN) -m pytest -m slow tests/test_examples.py $(PYTEST)

abi-check: $(READY)
	$(RUN) scripts/abi_check.py

gpu-check: $(READY)
	$(RUN) scripts/gpu_check.py

wheels: $(VENV)/.release
	$(RUN) scripts/wheels.py

sbom: $(VENV)/.release
	$(RUN) scripts/sbom.py

install-matrix: $(READY)
	$(RUN) scripts/install_matrix.py

lock: $(RUN)
	$(PIP) install --quiet uv
	$(RUN) scripts/lock.py '$(TORCH)'

barriers: $(READY)
	$(RUN) scripts/barriers.py

fuzz: $(READY)
	FUSED_MLP_FUZZ=$(FUZZ) $(RUN) -m pytest -m fuzz $(PYTEST)

fuzz-bytes: $(READY)
	$(INSTALL) '.[fuzz]'
	$(RUN) scripts/fuzz_bytes.py -runs=100000

mutants: $(READY)
	$(RUN) scripts/mutants.py --output build/mutants.json $(MUTANTS)

soak: $(READY)
	$(RUN) scripts/soak.py

reliability: $(READY)
	$(RUN) scripts/reliability.py $(if $(wildcard build/mutants.json),--mutants build/mutants.json)

asan: $(READY)
	$(RUN) scripts/sanitize.py address $(PYTEST)

ubsan: $(READY)
	$(RUN) scripts/sanitize.py undefined $(PYTEST)

tsan: $(READY)
	$(RUN) scripts/sanitize.py thread $(PYTEST)

$(RUN):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
	  || { echo '$(PYTHON) is older than 3.10: make PYTHON=python3.12 …'; exit 1; }
	@$(PYTHON) -m venv $(VENV) \
	  || { rm -rf $(VENV); echo 'no venv module: on Debian, sudo apt install python3-venv'; exit 1; }

# A library older than csrc/ is rebuilt on import, so sources need no place here. CUDA kernels are
# compiled for this machine's GPUs alone, and not at all without one.
INSTALL := FUSED_MLP_CUDA_ARCHS=$${FUSED_MLP_CUDA_ARCHS:-native} $(PIP) install --quiet
# Exactly what a lock file lists: no other version, no other file, no dependency it does not name.
INSTALL_LOCK := $(PIP) install --quiet --require-hashes --no-deps -r .ci/locks

ifeq ($(LOCKED),)

$(READY): pyproject.toml setup.py | $(RUN)
	$(PIP) install --quiet '$(TORCH)'
	$(INSTALL) -e '.[bench,test,triton]'
	@touch $@

# Some 20 packages that only tests of examples/ need; torch is named so that none replaces it.
$(VENV)/.examples: pyproject.toml | $(READY)
	$(INSTALL) -e '.[examples]' '$(TORCH)'
	@touch $@

$(VENV)/.lint: pyproject.toml | $(READY)
	$(INSTALL) -e '.[lint]'
	@touch $@

$(VENV)/.release: pyproject.toml | $(READY)
	$(INSTALL) -e '.[release]'
	@touch $@

else

$(READY): pyproject.toml setup.py .ci/locks/test.txt .ci/locks/triton.txt | $(RUN)
	$(INSTALL_LOCK)/test.txt
	$(PIP) install --quiet '$(TORCH)'
	$(RUN) -c 'import triton' 2>/dev/null || $(INSTALL_LOCK)/triton.txt
	$(INSTALL) --no-build-isolation --no-deps -e .
	@touch $@ $(VENV)/.examples $(VENV)/.lint

$(VENV)/.examples $(VENV)/.lint: | $(READY)

$(VENV)/.release: .ci/locks/release.txt | $(READY)
	$(INSTALL_LOCK)/release.txt
	@touch $@

endif

clean:
	rm -rf build dist *.egg-info fused_mlp/_C_*.so fused_mlp/_C_*.json
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +

distclean: clean
	rm -rf $(VENV)
