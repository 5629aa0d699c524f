PYTHON ?= python3
BIN = .venv/bin
SOURCES = alignkit recipes tests benchmarks papers

.PHONY: bench papers demo demo-diffusion demo-rl demo-rlhf test test-slow test-bench lint docs-check docs

demo: .venv/.done
	OMP_NUM_THREADS=1 $(BIN)/alignkit demo

demo-diffusion: .venv/.done
	OMP_NUM_THREADS=2 $(BIN)/alignkit demo diffusion

demo-rl: .venv/.done
	OMP_NUM_THREADS=2 $(BIN)/alignkit demo rl

demo-rlhf: .venv/.done
	OMP_NUM_THREADS=1 $(BIN)/alignkit demo rlhf

test: .venv/.done
	$(BIN)/python -m pytest -n 2 -q -m "not slow and not gpu"

test-slow: .venv/.done
	$(BIN)/python -m pytest -n 2 -q -m "slow and not gpu"

test-bench: .venv/.done
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[bench]'
	TRL_EXPERIMENTAL_SILENCE=1 $(BIN)/python -m pytest -q -W "default" tests/bench/trl_parity.py tests/bench/trl_grpo.py

bench: .venv/.done
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[bench]'
	$(BIN)/python -m benchmarks $(BENCH)

papers: .venv/.done
	OMP_NUM_THREADS=2 $(BIN)/alignkit papers check --tier ci --tier cpu

lint: .venv/.done
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/mypy

docs-check: .venv/.done
	$(BIN)/python -m pytest -q tests/test_docs.py

docs: .venv/.done
	$(BIN)/python -m tests.docs

.venv/.done: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if v >= (3, 11) else f"alignkit needs Python 3.11 or newer, not {v[0]}.{v[1]}: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[test]'
	touch $@
