# `make run` grows a small network on real handwritten digits; `make test` proves the house; `make test-faults` kills
# and damages what it can, which takes much longer; `make down` stops what `run` left up.
# Each installs once into .venv (see scripts/install) and nothing on a second call. PYTHON=... chooses the interpreter.

.PHONY: help run test test-faults down install

help:
	@sed -n 's/^# //p' Makefile

run: install
	@.venv/bin/esper-cli start-run --quick-start digits

test: install
	@scripts/check
	@scripts/test

test-faults: install
	@scripts/test-faults

down: install
	@.venv/bin/esper-cli down

install:
	@scripts/install
