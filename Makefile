# make demo    set up .venv and segment the sample scan        make test    the tests (under 15 minutes with demo, 2 cores)
# make verify  long suites: training, faults, hostile input    make bench   benchmarks against peers, JSON out
# make bench-report   README's tables and plot from Testing/data/bench (make bench SIZE=300,512,512: larger scans)
# make lint    ruff and mypy                                   make clean   remove .venv and results
PYTHON ?= python3
VENV ?= .venv
DATA ?= $(wildcard ../shared/data)
PEERS ?= .venv-peers
SIZE ?= 120,192,192
BIN = $(VENV)/bin
JOBS ?= 2
PYTEST = $(BIN)/python -m pytest $(if $(DATA),--data=$(DATA))

.PHONY: demo test verify bench bench-report peers lint clean setup

setup: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

demo: setup
	$(BIN)/ctseg demo --overwrite

# Whole files go to a process each, which computes with one thread: two cores are then used well.
test: setup
	OMP_NUM_THREADS=1 $(PYTEST) -m "not slow" -n $(JOBS) --dist loadfile

verify: setup
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[verify]'
	$(PYTEST)
	PYTHONPATH=Testing $(BIN)/python -m faults
	PYTHONPATH=Testing $(BIN)/python -m fuzz
	$(BIN)/python Testing/tools/reliability.py

peers: $(PEERS)/.ready

$(PEERS)/.ready: Testing/peers/requirements.txt constraints.txt
	$(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(PEERS)/bin/pip install --quiet --disable-pip-version-check -c constraints.txt -r Testing/peers/requirements.txt
	$(PEERS)/bin/pip install --quiet --disable-pip-version-check --no-deps TotalSegmentator==2.18.0
	touch $@

bench: setup peers
	$(BIN)/python Testing/bench/peers.py --size $(SIZE) --peer-python $(PEERS)/bin/python --json peers-bench.json
	$(BIN)/python Testing/bench/engine.py --json engine-bench.json
	$(BIN)/python Testing/bench/vista.py --json vista-bench.json

bench-report: setup
	$(BIN)/python Testing/bench/report.py

lint: setup
	$(BIN)/ruff check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) $(PEERS) ctseg-demo peers-bench.json engine-bench.json vista-bench.json .pytest_cache .ruff_cache .mypy_cache
