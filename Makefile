PYTHON ?= python3
ARGS ?=

.PHONY: help demo demo-model demo-storymaker test browser-test lint validate clean python

help:
	@echo "make demo        draw a four-frame story without and with StoryLoom, measure both and print the path of the page,"
	@echo "                 in a real ComfyUI on the CPU, or without one   (make demo ARGS=\"--host standalone\" chooses)"
	@echo "make demo-model  retrain the demo model: about 80 minutes on one core, less on two"
	@echo "make demo-storymaker  train a StoryMaker adapter for the demo model (make demo-storymaker ARGS=\"--help\")"
	@echo "make test        run every test, on each ComfyUI version found   (make test ARGS=\"-k svr\" selects tests)"
	@echo "                 (make test SETTING=busy: in another CPU setting, see CONTRIBUTING.md)"
	@echo "make browser-test  run only the tests in ComfyUI's own interface, and install their dependencies"
	@echo "make lint        ruff check and ruff format --check"
	@echo "make validate    run the checks of ComfyUI's ecosystem on the files of a release"
	@echo "make clean       remove the environments (.venv, .venv-validate) and the results (out)"

python:
	@"$(PYTHON)" -c "import sys; sys.exit(sys.version_info < (3, 10))" 2>/dev/null || { echo "StoryLoom needs Python 3.10 or newer, but '$(PYTHON)' is older or missing. Install a newer Python, or select one with 'make $(MAKECMDGOALS) PYTHON=/path/to/python3'." >&2; exit 1; }

demo: python
	@"$(PYTHON)" scripts/demo.py $(ARGS)

demo-model: python
	@"$(PYTHON)" scripts/environment.py
	@.venv/bin/python -m storyloom.training.demo $(ARGS)

demo-storymaker: python
	@"$(PYTHON)" scripts/environment.py
	@.venv/bin/python -m storyloom.training.storymaker.demo $(ARGS)

test: python
	@"$(PYTHON)" scripts/test.py $(ARGS)

browser-test: python
	@"$(PYTHON)" scripts/test.py browser $(ARGS)

lint: python
	@"$(PYTHON)" scripts/environment.py
	@.venv/bin/ruff check . && .venv/bin/ruff format --check .

validate: python
	@"$(PYTHON)" scripts/validate.py

clean:
	rm -rf .venv .venv-validate out
