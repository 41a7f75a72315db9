# `make help` prints this file's targets. Every target sets up what it needs first.
SHELL := /bin/bash
PY := .venv/bin/python

.PHONY: help setup demo test check fuzz test-crash test-matrix test-simulator bench bench-gateway bench-log bench-store bench-scale bench-fork bench-life bench-sleepers clean

help: ## print the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  \1\t\2/' | expand -t 20

setup: ## install what is missing: Debian packages, .venv, torpor-init, runsc
	@scripts/setup

demo: setup ## a coding agent survives kill -9 of everything (PROVIDER=openai|anthropic for the real thing)
	@$(PY) examples/demo/demo.py $(if $(PROVIDER),--provider $(PROVIDER))

test: setup ## the whole test suite, three tests at a time
	@$(PY) -m pytest tests -n 3 --dist worksteal --durations 40

check: setup ## formatting, lint, types, layers, sizes, the C code's own checks
	@scripts/check

test-crash: setup ## 200 random kills over 20-turn sessions, with a witness outside
	@$(PY) -m pytest tests/crash -m '' --crash-kills 200 -s

fuzz: setup ## bytes of a hostile agent into the gateway's readers, for 30 seconds (FUZZ_SECONDS=)
	@$(PY) scripts/fuzz_gateway.py $(or $(FUZZ_SECONDS),30)

test-matrix: setup ## every client, killed at every point and with every fault of its provider (installs them below .tools)
	@$(PY) -m pytest -p no:cacheprovider tests/matrix --matrix

test-simulator: setup ## 100,000 random schedules of the recovery rules
	@$(PY) -m torpor.testing.simulator --schedules 100000

bench: setup ## freeze, restore and bytes per turn beside raw runsc
	@$(PY) scripts/bench.py

bench-gateway: setup ## latency that the gateway adds, beside LiteLLM's proxy (which it installs below .tools)
	@$(PY) scripts/bench_gateway.py

bench-log: setup ## bytes per turn of a session of 1,000 turns, and the time to read one
	@$(PY) scripts/bench_log.py

bench-store: setup ## the snapshot store beside raw runsc, zstd and restic, on 50 images of three agents
	@scripts/install_packages restic zstd
	@$(PY) scripts/bench_store.py

bench-fork: setup ## a fork of ten in one command, beside copying the raw image ten times
	@$(PY) scripts/bench_fork.py

bench-scale: setup ## a store of 10,000 snapshots with a session of 1,000 checkpoints: ls, collect, verify, restore (an hour)
	@PYTHONPATH=src:. $(PY) scripts/bench_scale.py $(if $(SCALE_HOME),--home $(SCALE_HOME))

bench-life: setup ## waking from each tier, beside raw runsc restore; what a sleep saves and costs
	@$(PY) scripts/bench_life.py

bench-sleepers: setup ## ten thousand hibernated sessions: memory, torpor ls, timers, a hundred that wake at once
	@$(PY) scripts/bench_sleepers.py

clean: ## remove what was built
	rm -rf .venv build dist native/init/build src/torpor/sandbox/torpor-init .pytest_cache .ruff_cache
