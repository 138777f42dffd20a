# `make run` and `make test` do all the set-up on a fresh machine.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
AUDIT := .audit

# Advisories that concern a pinned version and do not reach heapr; docs/security.md says why.
EXPLAINED := CVE-2024-35515 CVE-2026-69112
# These on Python 3.10 only, which the releases that mend them left behind.
EXPLAINED += CVE-2026-92287 CVE-2026-96637 CVE-2026-96639 CVE-2026-96640 CVE-2026-96641 CVE-2026-96643 \
	CVE-2026-96644 CVE-2026-96778 CVE-2026-112393 CVE-2026-112395 CVE-2026-112396 CVE-2026-112398 \
	CVE-2026-112403 CVE-2026-112902 CVE-2026-128067

.PHONY: setup run test slow launchers faults lint type bench gpu engines audit clean

run: $(STAMP) ## prune the built-in model on real text, offline
	$(BIN)/python run.py

test: $(STAMP) ## the quick suite; under 3 minutes on two cores
	$(BIN)/python -m pytest --numprocesses auto --dist loadfile

slow: $(STAMP) ## several processes, and whole pipelines at the built-in models' size
	$(BIN)/python -m pytest --numprocesses auto --dist loadfile -m 'slow and not launcher and not faults'

launchers: $(STAMP) ## sweeps through joblib, submitit, Ray and a fake SLURM
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[joblib,slurm,ray]'
	$(BIN)/python -m pytest -m launcher tests/launchers

faults: $(STAMP) ## kills, races, damage, full disks, and a long sweep that is killed; under 20 minutes
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[joblib]'
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile -rP --show-capture=stdout -m faults tests/faults

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

type: $(STAMP)
	$(BIN)/mypy

bench: $(STAMP) ## calibration against the floor and against the published two-stage procedure
	$(BIN)/python benchmarks/calibration.py

engines: $(STAMP) ## every form of a checkpoint in vLLM, llama.cpp and MLX; builds their environments in .engines/
	$(BIN)/python benchmarks/engines/table.py

gpu: ## all that is measured on a GPU, toy shapes without one; installs nothing, WHEELS=folder has what is missing
	$(or $(wildcard $(BIN)/python),$(PYTHON)) -m benchmarks.gpu $(if $(WHEELS),--wheels $(WHEELS))

# --strict: otherwise packages that the service knows nothing about pass
audit: ## the pinned versions against published advisories, in an environment of its own; needs a network
	$(PYTHON) -m venv $(AUDIT)
	$(AUDIT)/bin/python -m pip install --quiet 'pip-audit>=2.10,<3'
	@echo 'asking a vulnerability service, for which a network is needed'
	$(AUDIT)/bin/pip-audit --requirement constraints.txt --no-deps --disable-pip --strict --progress-spinner off \
		$(addprefix --ignore-vuln=,$(EXPLAINED))

setup: $(STAMP)

# torch first: pip then takes the pinned build and nothing else satisfies the others. What has no wheel is built with the
# pinned setuptools, not with the newest.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "heapr needs Python 3.10 or newer; name one with make PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch setuptools
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-build-isolation --editable '.[dev]'
	touch $(STAMP)

clean:
	rm -rf $(VENV) $(AUDIT) .pytest_cache .ruff_cache .mypy_cache
