# make demo: set up the environment and train a small DETR.   make test: set it up, then linter and all tests.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
DEMO := runs/demo

.PHONY: demo test test-fast test-slurm lint format clean

demo: $(VENV)/.run
	@echo "training takes 7 to 9 minutes on two cores"
	$(RUN) main.py --recipe demo $(DEMO_MORE) --output_dir $(DEMO) --resume auto
	$(RUN) tools/show_predictions.py --run $(DEMO)
	@echo "AP above; curves in $(DEMO)/curves.png, predictions in $(DEMO)/predictions.png"

test: lint  # about 13 minutes on two cores
	OMP_NUM_THREADS=1 $(RUN) -m pytest -q -rs --durations=10 -n 2 --dist worksteal

test-fast: $(VENV)/.dev  # unit tests only
	OMP_NUM_THREADS=1 $(RUN) -m pytest -q -n 2 -m "not slow and not distributed and not slurm and not gpu"

test-slurm: $(VENV)/.dev  # as root: installs Debian's Slurm if it is absent, and runs jobs on a cluster of one node
	tests/slurm_cluster.sh start .slurm
	status=0; DETR_TEST_SLURM=1 SLURM_CONF=$(CURDIR)/.slurm/slurm.conf $(RUN) -m pytest -q tests/test_slurm.py || status=$$?; \
	tests/slurm_cluster.sh stop .slurm; exit $$status

lint: $(VENV)/.dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ty check

format: $(VENV)/.dev
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

$(VENV)/.run: requirements.txt
	test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install -q -r requirements.txt
	touch $@

$(VENV)/.dev: requirements-dev.txt $(VENV)/.run
	$(RUN) -m pip install -q -r requirements-dev.txt
	touch $@

clean:
	rm -rf $(VENV) .slurm runs
