# The commands of everyday work. Each is one line that can be typed by hand as well; `make` alone lists them.
.DEFAULT_GOAL := help
.PHONY: help setup test test-all lint format type docs lock
RUN := . scripts/env.sh >/dev/null &&

help:      ## list these commands
	@grep -E '^[a-z-]+: .*##' Makefile | sed 's/:.*##/	/'

setup:     ## make or repair .venv from requirements.lock
	bash scripts/env.sh

test:      ## lint, types, unit tests
	bash scripts/test.sh

test-all:  ## everything that continuous integration runs
	bash scripts/test.sh --all

lint:      ## ruff: rules and format
	bash -c '$(RUN) ruff check . && ruff format --check .'

format:    ## rewrite files in ruff's format
	bash -c '$(RUN) ruff check --fix . && ruff format .'

type:      ## mypy on both packages
	bash -c '$(RUN) mypy'

docs:      ## run every example of the docstrings and every fenced block of README and docs that is tested
	bash -c '$(RUN) python -m pytest -q --doctest-modules fuzzyroe llava && python -m pytest -q tests/test_docs.py'

lock:      ## write requirements.lock from requirements.txt (needs uv)
	bash scripts/lock.sh
