# Two commands on a fresh machine: `make train` and `make test`. They need Python 3.11 or newer, pip and make.
# Set-up is remembered in stamp files and done again only when pyproject.toml or constraints.txt changes.

PYTHON ?= python3
PIP_FLAGS ?=
ARGS ?=
# The whole suite runs on all cores; a part of it, which ARGS names, in one process that starts at once.
PARALLEL = $(if $(ARGS),,-n auto --maxprocesses 8 --dist worksteal)

VENV := .venv
BIN := $(VENV)/bin
# editable_mode=compat: a plain path. setuptools' own finder loses against a folder named rlfeed beside a user's script.
INSTALL := $(BIN)/python -m pip install --disable-pip-version-check $(PIP_FLAGS) -c constraints.txt \
	--config-settings editable_mode=compat

.PHONY: help train test test-slow lint tensorboard benchmark scores peers clean

help:
	@echo "make train [ARGS=...]      train DQN on CartPole-v1, or what ARGS says: ARGS=\"dqn --env.id Acrobot-v1\""
	@echo "make test [ARGS=...]       run the tests on all cores; with ARGS what it says, in one process"
	@echo "make test-slow             run the long learning tests as well"
	@echo "make lint                  ruff and pyright"
	@echo "make tensorboard           show the curves of all runs"
	@echo "make benchmark [ARGS=...]  measure the data path on this machine"
	@echo "make scores [ARGS=...]     train and score every agent on published tasks; goes on where it was stopped"
	@echo "make peers                 install the libraries that make benchmark compares with"
	@echo "make clean                 remove the environment and caches; runs stay"

train: $(VENV)/cli.stamp
	$(BIN)/python scripts/train.py $(ARGS)

test: $(VENV)/dev.stamp
	$(BIN)/python -m pytest $(PARALLEL) $(ARGS)

test-slow: $(VENV)/dev.stamp
	$(BIN)/python -m pytest -m "slow or not slow" $(ARGS)

lint: $(VENV)/dev.stamp
	$(BIN)/ruff check .
	$(BIN)/pyright --pythonpath $(BIN)/python

tensorboard: $(VENV)/cli.stamp
	$(BIN)/tensorboard --logdir runs $(ARGS)

benchmark: $(VENV)/cli.stamp
	$(BIN)/python scripts/benchmark.py $(ARGS)

scores: $(VENV)/cli.stamp
	$(BIN)/python scripts/scores.py $(ARGS)

peers: $(VENV)/bench.stamp

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# A half-made environment has no stamp, so it is made again.
$(VENV)/created.stamp:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "make: $(PYTHON) is missing or too old; expected Python 3.11 or newer. Name one: make PYTHON=python3.11"; exit 2; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/cli.stamp: $(VENV)/created.stamp pyproject.toml constraints.txt
	$(INSTALL) -e ".[cli]"
	@touch $@

$(VENV)/dev.stamp: $(VENV)/created.stamp pyproject.toml constraints.txt
	$(INSTALL) -e ".[dev]"
	@touch $@

$(VENV)/bench.stamp: $(VENV)/created.stamp pyproject.toml constraints.txt
	$(INSTALL) -e ".[cli,bench]"
	@touch $@
