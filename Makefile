# The front door: every target works in a fresh clone, with nothing installed but Python and make.

PYTHON ?= python3
BIN := .venv/bin
# One thread for each of the two test processes: more would only fight over the cores.
THREADS ?= 1

.DEFAULT_GOAL := help
.PHONY: help demo test check bench-accuracy bench-apply bench-calibrate bench-faults bench-kernels bench-situations bench-speed bench-zoo docs

help: ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 24

demo: .venv/installed-demo ## see it work, on a model and data that need no download
	@$(BIN)/gainstage demo --plot demo.png

test: .venv/installed-dev .venv/installed-zoo ## run the tests
	@OMP_NUM_THREADS=$(THREADS) $(BIN)/pytest -n 2 tests

check: .venv/installed-dev ## lint, format, types, architecture
	@$(BIN)/ruff check --quiet .
	@$(BIN)/ruff format --quiet --check .
	@$(BIN)/mypy --strict src
	@$(BIN)/lint-imports --no-logo

bench-accuracy: .venv/installed-zoo ## predicted against measured, over the model zoos
	@$(BIN)/python -m benchmarks.accuracy
	@$(BIN)/python -m benchmarks.cosines

bench-apply: .venv/installed-dev ## elements per second of drawing, against torch and against memory
	@$(BIN)/python -m benchmarks.apply

bench-calibrate: .venv/installed-bench ## one pass of gs.calibrate against the package lsuv: seconds and achieved levels
	@$(BIN)/python -m benchmarks.calibrate

bench-faults: .venv/installed-zoo ## faults put into models on purpose: found, blamed on the right parameter, false alarms
	@$(BIN)/python -m benchmarks.faults

bench-kernels: .venv/installed-dev ## tables at infinite width against the kernels of neural-tangents
	@$(BIN)/python -m benchmarks.neural_tangents

bench-situations: .venv/installed-zoo .venv/installed-dev .venv/installed-tables ## the eight situations, asked for and measured on real models
	@$(BIN)/python -m benchmarks.situations

bench-speed: .venv/installed-zoo ## seconds and memory of every stage
	@$(BIN)/python -m benchmarks.speed

bench-zoo: .venv/installed-zoo ## every model of three zoos and 34 awkward ones: captured, planned, compared with draws
	@$(BIN)/python -m benchmarks.zoo

docs: .venv/installed-dev ## fill the tables of README.md and docs/ from the measurements
	@$(BIN)/python -m docs.build

# The stamp of an extra: newer than what it was installed from, or it is installed again.
.venv/installed-%: pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing gainstage[$*] into .venv"
	@$(BIN)/python -m pip install --quiet --quiet --disable-pip-version-check -c constraints.txt -e '.[$*]'
	@touch $@

$(BIN)/python:
	@$(PYTHON) -m venv .venv
