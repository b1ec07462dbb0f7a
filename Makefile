# `make run` grows a small network on real handwritten digits; `make test` proves the house; `make down` stops what `run` left up.
# Each installs once into .venv (see scripts/install) and nothing on a second call. PYTHON=... chooses the interpreter.

.PHONY: help run test down install

help:
	@sed -n 's/^# //p' Makefile

run: install
	@.venv/bin/esper-cli start-run --quick-start digits

test: install
	@scripts/check
	@scripts/test

down: install
	@.venv/bin/esper-cli down

install:
	@scripts/install
