# make demo: set up the environment, then watch a DETR learn.   make test: set it up, then lint and all tests.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
DEMO := runs/demo

.PHONY: demo test lint format clean

demo: $(VENV)/.run
	$(RUN) main.py --dataset_file shapes --output_dir $(DEMO) --resume auto --device cpu $(DEMO_FLAGS)
	$(RUN) tools/show_predictions.py --run $(DEMO)
	@echo "AP above; curves in $(DEMO)/curves.png, predictions in $(DEMO)/predictions.png"

test: lint
	$(RUN) -m pytest -q

lint: $(VENV)/.dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

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
	rm -rf $(VENV) runs
