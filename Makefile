# Two commands do everything on a machine with Python and pip: `make quickstart` and `make test`.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: quickstart test lint docs benchmark clean

quickstart: .venv/run.done
	$(BIN)/soteacher run quickstart --out runs/quickstart --resume

test: .venv/dev.done lint
	$(BIN)/python -m pytest

lint: .venv/dev.done
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/basedpyright

docs: .venv/dev.done
	$(BIN)/mkdocs build --strict

benchmark: .venv/dev.done
	for name in input optimizers teachers step distillation objectives methods side_by_side start teacher_cache; do \
		$(BIN)/python -m benchmarks.$$name || exit; \
	done

# The constraints pin every package; that of torch makes pip take a CPU build where it finds one.
.venv/bin/pip:
	$(PYTHON) -m venv .venv

.venv/run.done: .venv/bin/pip pyproject.toml constraints.txt
	$(BIN)/pip install --quiet --constraint constraints.txt --editable .
	touch $@

.venv/dev.done: .venv/bin/pip pyproject.toml constraints.txt
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@ .venv/run.done

clean:
	rm -rf .venv build site .pytest_cache .ruff_cache
