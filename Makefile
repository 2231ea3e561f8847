# SPDX-License-Identifier: Apache-2.0
# Everything runs as root on Debian 12. The virtual environment is made from the system's Python, because
# bcc comes from the distribution and from nowhere else.

# What was compiled for one demo, test or benchmark is used by the next.
export EBPFPROXY_CACHE_DIR := $(CURDIR)/.bytecode
# And what Python compiled by the next process, whatever the environment says.
unexport PYTHONDONTWRITEBYTECODE

VENV   := .venv
PYTHON := $(VENV)/bin/python
# A file of tests to each worker, or a folder (tests/conftest.py); in the order of their names, so that the long ones
# are not the last. Tests wait for half of their time.
WORKERS ?= $(shell echo $$((3 * $$(nproc) + 1)))
FAST_WORKERS ?= $(shell echo $$((2 * $$(nproc))))
PARALLEL := -n $(WORKERS) --dist loadfile --no-loadscope-reorder
C      := $(shell find bpf tests tools -name '*.[ch]' -not -path 'bpf/include/*')

.PHONY: demo fuzz test test-fast test-newest test-kernels test-image test-cluster test-cnis test-faults trust bench all-tests lint lint-python lint-types lint-c collected format setup lock clean

demo: setup
	$(PYTHON) -m tools.demo

test: setup
	$(MAKE) -j2 --output-sync=target collected lint-c lint-python
	$(MAKE) -j2 lint-types all-tests

# Tests run make, too, which is not to take its jobs from this one.
all-tests: setup
	MAKEFLAGS= $(PYTHON) -m pytest -q $(PARALLEL)

# Python compiles all tests once: the workers, which begin at once, would each compile all of them. Tests say which files
# are wrong.
collected: setup
	-@$(PYTHON) -m pytest -q --collect-only >/dev/null

# What needs neither root nor the bpf system call, with a tenth of hypothesis' examples: the loop while writing. Tests
# wait for half of their time, but each worker also collects them all.
test-fast: setup
	$(PYTHON) -m pytest -q -n $(FAST_WORKERS) --dist worksteal --hypothesis-profile fast \
		-m 'not root and not image and not systemd and not cluster'

# The newest versions of what the lock names, in an environment of its own: says which they are and what breaks.
# PYTEST=tests/kube takes a part.
test-newest: setup
	$(PYTHON) -m tools.newest $(PYTEST)

# What these commands find is kept in docs/tested: a part that is run replaces that part of docs/tested.md.
# What depends on the kernel, on kernels of Debian's suites, in an emulator: hours for all of them.
# KERNELS="6.1-cloud 6.12-rt" takes some of them.
test-kernels: setup
	EBPFPROXY_TESTED=docs/tested.md $(PYTHON) -m tests.kernels $(KERNELS)

# The container image, from the Dockerfile's steps in a clean Debian; the unit in a systemd of its own.
test-image: setup
	$(PYTHON) -m pytest -m 'image or systemd' tests/deploy

# A cluster of two nodes on this machine, of the binaries in the folder KUBE_BIN, and the Kubernetes e2e suite in it.
test-cluster: setup
	EBPFPROXY_TESTED=docs/tested.md $(PYTHON) -m pytest -m cluster -v -n 2 --dist loadscope --no-loadscope-reorder tests/cluster

# The agent, its node and the API server fail in all ways that are known here, under load. The whole takes hours.
# EBPFPROXY_FAULTS_EVERY=9 takes one of nine steps, with EBPFPROXY_FAULTS_PART=1 to 8 others. FAULTS=tests/faults/test_api.py
# takes a part of the tests.
FAULTS ?= tests/faults
test-faults: setup
	EBPFPROXY_TESTED=docs/tested.md $(PYTHON) -m pytest -m "faults or not faults" -v -n 2 --dist worksteal $(FAULTS)

# Bad input: coverage-guided fuzzing of what decodes others' data, a million steps of the tracker and the writer, ten
# million packets. ARGUMENTS="packets --packets 1000000" takes a part.
fuzz: setup
	$(PYTHON) -m pip install -q --no-deps --require-hashes -r tools/lock/fuzz.txt
	EBPFPROXY_TESTED=docs/tested.md $(PYTHON) -m tests.fuzz $(ARGUMENTS)

# Pods in the networks of real CNIs, and nodes with unusual ones.
test-cnis: setup
	EBPFPROXY_TESTED=docs/tested.md $(PYTHON) -m pytest -m root -n 3 --dist loadscope --no-loadscope-reorder tests/cnis

# All of the above, one after the other, with the time of each; PARTS="test-cnis fuzz" takes some of them.
trust: setup
	EBPFPROXY_TESTED=docs/tested.md $(PYTHON) -m tests.trust $(PARTS)

bench: setup
	$(PYTHON) -m tools.bench --json bench.json

lint: setup
	$(MAKE) -j2 --output-sync=target lint-python lint-types lint-c

lint-python: setup
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(PYTHON) -m tools.layers
	$(PYTHON) -m tools.comments

# Without a cache it takes 15 s of processor time, which in `make test` is that for which tests wait.
lint-types: setup
	nice -n 19 $(VENV)/bin/mypy

lint-c: setup
	clang-format --dry-run --Werror $(C)
	$(PYTHON) -m ebpfproxy.datapath.programs.build --strict $(EBPFPROXY_CACHE_DIR)

format: setup
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .
	clang-format -i $(C)

setup: $(VENV)/.done

$(VENV)/.done: pyproject.toml tests/setup.sh tools/lock/setup.txt tools/lock/test.txt
	tests/setup.sh $(VENV)
	touch $@

# The lock of all Python packages, made anew.
lock:
	tools/lock.sh

clean:
	rm -rf $(VENV) $(VENV)-newest .bytecode .kernels build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
