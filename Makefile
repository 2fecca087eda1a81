# Two commands for a fresh machine with Python 3.11: `make train` and `make test`. Both set up what they need.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
BIN := $(VENV)/bin
# the deepspeed launcher starts workers by the interpreter and tools it finds first
RUN := PATH="$(CURDIR)/$(BIN):$$PATH"
EXP ?= Baseline
ARGS ?=
# test processes; each runs torch on one thread
JOBS ?= 2
TEST := $(RUN) OMP_NUM_THREADS=1 python -m pytest -n $(JOBS)

.PHONY: help setup train test test-all faults compile-all gpu study study-rates check format clean

help:
	@echo "make train [EXP=Baseline] [ARGS='--recipe demo']   set up, then train an experiment"
	@echo "make test                                          set up, then the tests that CI runs"
	@echo "make test-all                                      the slow ones too"
	@echo "make faults                                        what each injected fault led to, a table"
	@echo "make compile-all                                   every kernel for every GPU target, without a GPU"
	@echo "make gpu                                           a GPU's first hour: what holds on it, on one page"
	@echo "make study                                         every experiment as a mini, over seeds; continues"
	@echo "make study-rates                                   four of them, each at its own best learning rate"
	@echo "make check                                         ruff and mypy"

# Installed anew when the requirements change. torch comes first and alone: resolved with the others, a newer CUDA
# build could win.
$(BIN)/.installed: setup.py pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt torch==2.13.0
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[dev]"
	touch $@

setup: $(BIN)/.installed

train: setup
	$(RUN) deepspeed train.py --exp $(EXP) $(ARGS)

test: setup
	$(TEST)

test-all: setup
	$(TEST) -m "slow or not slow"

# kills, full disks, damaged files, numbers that are not finite: a quarter of an hour
faults: setup
	$(TEST) -q -m fault --fault-table

# every experiment's kernels for every target: half an hour the first time, kept in Triton's cache after that
compile-all: setup
	$(RUN) python -m bench.compiled --exp all --arch all

# without a GPU: what of it can run on the CPU, half an hour on two cores
gpu: setup
	$(RUN) python -m bench.gpu $(ARGS)

STUDY_SEEDS := 5,Baseline=8,APEUnitVariance=8,ReLUGatedLinearUnit=8,ReLUGatedLinearUnitControlled=8
STUDY_SEEDS := $(STUDY_SEEDS),GELUGatedLinearUnit=8,GELUGatedLinearUnitControlled=8
STUDY_SEEDS := $(STUDY_SEEDS),SiLUGatedLinearUnit=8,SiLUGatedLinearUnitControlled=8
STUDY := $(RUN) march compare --recipe mini --slots 2
# about 240 runs of a minute and a half on a core, two at a time; what is there is kept
study: setup
	$(STUDY) all --out docs/results/mini --seeds $(STUDY_SEEDS) $(ARGS)

# does the ranking hang on the learning rate? each at its own best of the study's and its neighbours
study-rates: setup
	$(STUDY) Baseline SiLUGatedLinearUnitControlled UnifiedAttention StandardCrossAttention \
		--grid optimizer.lr=1e-3,2e-3,4e-3 --out docs/results/mini-rates $(ARGS)

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf build *.egg-info .pytest_cache .mypy_cache .ruff_cache
