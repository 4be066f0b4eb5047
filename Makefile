# `make demo` shows what the project does and `make test` checks it; each sets up .venv first, once.
#
#   make setup PYTHON=python3.12    choose the interpreter (3.11 or newer)
#   make test WORKERS=8             more processes

PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3.14 python3; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
VENV := .venv
PY := $(VENV)/bin/python
WORKERS ?= 2
PYTEST := HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(PY) -m pytest

.DEFAULT_GOAL := help
.PHONY: help setup demo methods test format slow browser docs lock tiny-sd clean

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /  make \1\t/p' $(MAKEFILE_LIST) | expand -t 16

setup: $(VENV)/.installed ## make .venv with the locked versions

# The stamp is the last thing written: an interrupted set-up starts again.
$(VENV)/.installed: pyproject.toml requirements.lock
	@test -n "$(PYTHON)" || { echo "error: no Python 3.11 or newer found; name one with PYTHON=..." >&2; exit 2; }
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check --requirement requirements.lock
	$(PY) -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	touch $@

demo: setup ## volumes to slices to LoRA to a drift report, on the embedded base model: demo/report.html
	HF_HUB_OFFLINE=1 $(PY) benchmarks/demo.py

methods: setup ## every method on the demo's slices, half an hour: benchmarks/results/methods.json and .png
	HF_HUB_OFFLINE=1 $(PY) benchmarks/methods.py

test: setup ## format, lint, types and tests, offline
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy
	$(PYTEST) -n $(WORKERS)

format: setup ## rewrite the code as `make test` wants it
	$(VENV)/bin/ruff format .
	$(VENV)/bin/ruff check --fix .

slow: setup ## the tests that take minutes
	$(PYTEST) -m slow

browser: setup ## look at the report in a headless browser
	$(PYTEST) -m browser

docs: setup ## the pages of docs/ as a site: site/index.html; a broken link fails
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict --quiet
	@echo "site/index.html; with search: $(PY) -m http.server --directory site"

lock: setup ## move every dependency but torch to its newest version and write requirements.lock
	$(PY) -m pip install --upgrade --upgrade-strategy eager --editable '.[dev,docs]' "$$(grep ^torch== requirements.lock)"
	{ grep '^#' requirements.lock; $(PY) -m pip list --format=freeze | grep -Ev '^(pip|tisserand)==' \
		| sed 's/+cpu$$//'; } > requirements.lock.new
	mv requirements.lock.new requirements.lock

tiny-sd: setup ## draw the small world and train the embedded base model again: runs/tiny-sd, about 2.5 hours
	$(PY) -m data_prep.shapes --num_images 48000 --seed 0 --output_dir data/shapes
	$(PY) finetune/pretrain.py --config configs/pretrain_tiny.yaml
	$(PY) finetune/pretrain.py --config configs/pretrain_tiny_colours.yaml
	$(PY) finetune/pretrain.py --config configs/pretrain_tiny_final.yaml

clean: ## remove caches and outputs, not .venv
	rm -rf .mypy_cache .ruff_cache .pytest_cache build demo site *.egg-info
