# Forwardpass: what a developer runs, by name; `make` alone lists it.
# Needs make and Python 3.11 or later with pip. Everything else goes into .venv, and once it is there nothing below
# touches the network again, until pyproject.toml changes. pip's own environment variables reach pip.

VENV   := .venv
PY     := $(VENV)/bin/python
PYTHON ?=# the interpreter that makes .venv; by default the first that is new enough
TORCH  ?= 2.13.0
EXTRAS ?= cpu,train,dev
MODELS ?= document digits mnist tabular
ARGS   ?=

# A copy of the pyproject.toml that .venv was made from. Written last, so that an interrupted set-up is taken up again.
READY  := $(VENV)/ready.toml
RECENT := import sys; sys.exit(sys.version_info < (3, 11))

ORT_DISABLE_TELEMETRY ?= 1
export ORT_DISABLE_TELEMETRY
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# Where the environment forbids bytecode, each of the hundreds of servers that tests start would compile the package
# anew, a fifth of its start.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help venv models demo test test-deploy test-slow zoo test-gpu examples lint format types tables docs \
        docs-tools release release-tools diagrams proto bench bench-gpu serve \
        clean distclean

help: ## list these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

# torch goes first and pinned: asked for together with the rest, pip may take another build of it. What is compared is
# pyproject.toml's content, not its time: a branch switch that leaves it as it was installs nothing.
venv: ## set up .venv (PYTHON=..., TORCH=2.13.0, EXTRAS=cpu,train,dev)
	@if cmp -s pyproject.toml $(READY) && $(PY) -c '' 2>/dev/null; then exit 0; fi; \
	set -eu; quiet=-qq; if [ -t 1 ]; then quiet=; fi; \
	if ! $(PY) -c '$(RECENT)' 2>/dev/null; then \
	    found=; \
	    for p in $(or $(PYTHON),python3.11 python3.12 python3.13 python3); do \
	        if "$$p" -c '$(RECENT)' 2>/dev/null; then found=$$p; break; fi; \
	    done; \
	    if [ -z "$$found" ]; then \
	        echo "Forwardpass needs Python 3.11 or later; here is: $$($(or $(PYTHON),python3) --version 2>&1 || true)" >&2; \
	        echo "Install one, or name it: make venv PYTHON=/path/to/python3.12" >&2; exit 1; \
	    fi; \
	    echo "[1/3] making $(VENV) with $$("$$found" --version)"; \
	    if "$$found" -c 'import ensurepip' 2>/dev/null; then "$$found" -m venv --clear $(VENV); \
	    else "$$found" -m venv --clear --without-pip $(VENV); "$$found" -m pip --python $(PY) install $$quiet pip; fi; \
	fi; \
	echo "[2/3] installing torch $(TORCH) (its CUDA build is several GB: CONTRIBUTING.md says how to get the CPU build)"; \
	$(PY) -m pip install $$quiet 'torch==$(TORCH)'; \
	echo "[3/3] installing forwardpass with [$(EXTRAS)]"; \
	$(PY) -m pip install $$quiet -e '.[$(EXTRAS)]'; \
	cp pyproject.toml $(READY); echo "$(VENV) is ready"

models: venv ## train and export the four recipes (MODELS='document digits mnist tabular')
	@set -e; for name in $(MODELS); do $(PY) models/$$name/train.py --repository models; done

demo: venv ## train digits, serve it, call it from concurrent clients, compare with PyTorch
	@$(PY) models/digits/train.py --repository models
	@$(PY) models/demo.py $(ARGS)

test: venv ## the tests, in minutes (ARGS='-k wire' and the like reach pytest)
	@$(PY) -m pytest -m "not slow" -n auto --dist loadfile $(ARGS)

test-deploy: venv ## chart, manifests and images, all of it (as root on Debian 12: real builds and runs)
	@$(PY) tests/deploy/toolbox.py
	@FORWARDPASS_TEST_DEPLOY=1 $(PY) -m pytest tests/deploy -m "" $(ARGS)

test-slow: venv ## the tests that take minutes each
	@$(PY) -m pytest -m slow --ignore tests/deploy $(ARGS)

zoo: venv ## networks and ONNX's own cases: what is proved of their rows, and 2 million answers, against running them
	@$(PY) -m pytest -m slow -s tests/unit/model/test_onnx_suite.py tests/unit/model/test_torch_networks.py \
	    tests/service/test_zoo_answers.py $(ARGS)

test-gpu: venv ## the tests that need a CUDA device (EXTRAS=gpu,train,dev)
	@$(PY) -m pytest tests/gpu $(ARGS)

# Foreign clients pin what the project does not, so they live apart. perf_analyzer is linked with a library that only
# Debian's package has: it is unpacked beside the rest, which takes no root. Clients in other languages are built from
# Debian's packages by the tests, where those are installed.
TOOLS := .venv-conformance
WANTED := tests/conformance/requirements.txt tests/conformance/requirements-old-grpc.txt
conformance-tools: venv ## get the foreign clients and tools that tests/conformance speaks with
	@if cat $(WANTED) | cmp -s - $(TOOLS)/ready.txt; then exit 0; fi; set -eu; \
	$(PY) -m venv --clear --without-pip $(TOOLS); \
	$(PY) -m pip --python $(TOOLS)/bin/python install -qq -r tests/conformance/requirements.txt; \
	$(PY) -m venv --clear --without-pip $(TOOLS)/old-grpc; \
	$(PY) -m pip --python $(TOOLS)/old-grpc/bin/python install -qq -r tests/conformance/requirements-old-grpc.txt \
	    || echo "no wheel of that old grpcio here: its test will be skipped" >&2; \
	if command -v apt-get >/dev/null && command -v dpkg-deb >/dev/null && mkdir -p $(TOOLS)/debian && cd $(TOOLS)/debian; then \
	    (apt-get download -qq libb64-0d || { apt-get update -qq && apt-get download -qq libb64-0d; }) >/dev/null 2>&1 \
	        && dpkg-deb -x libb64-0d_*.deb . || echo "no libb64-0d here: perf_analyzer will be skipped" >&2; \
	    cd ../..; \
	fi; \
	if command -v npm >/dev/null; then \
	    npm install --silent --no-fund --no-audit --prefix $(TOOLS)/node @grpc/grpc-js@1.14.7 >/dev/null \
	        || echo "no @grpc/grpc-js here: its test will be skipped" >&2; \
	fi; \
	cat $(WANTED) > $(TOOLS)/ready.txt; echo "$(TOOLS) is ready"

conformance: conformance-tools ## run foreign clients and tools against the server, the slow ones too
	@$(PY) -m pytest tests/conformance $(ARGS)

examples: venv ## run every program of docs/examples whose language is there (Node: after make conformance-tools)
	@$(PY) -m pytest tests/publish/test_examples.py -m "" $(ARGS)

lint: venv ## ruff: rules and format
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .

format: venv ## let ruff mend what it can
	@$(PY) -m ruff check --fix .
	@$(PY) -m ruff format .

types: venv ## mypy, strict
	@$(PY) -m mypy

tables: venv ## write the generated tables of README and docs anew
	@$(PY) docs/tables.py

# Apart from .venv, whose packages the site's would quarrel with. Without URL, links to files that are no pages are text.
DOCS := .venv-docs
URL  ?=# the repository's address, once there is one: https://...
# The requirements of one extra of pyproject.toml, without the project's own.
extra = $(PY) -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["$(1)"], sep="\n")'
docs-tools: venv
	@if cmp -s pyproject.toml $(DOCS)/ready.toml; then exit 0; fi; set -eu; \
	$(PY) -m venv --clear --without-pip $(DOCS); \
	$(call extra,docs) > $(DOCS)/requirements.txt; \
	$(PY) -m pip --python $(DOCS)/bin/python install -qq -r $(DOCS)/requirements.txt; \
	cp pyproject.toml $(DOCS)/ready.toml

docs: docs-tools ## build the site into build/site, strictly: a dead link is an error (URL=https://...)
	@NO_MKDOCS_2_WARNING=1 PROJECT_URL=$(URL) $(DOCS)/bin/python -m mkdocs build --strict --quiet -f deploy/publish/mkdocs.yml
	@echo "build/site/index.html is the site"

# Apart as well. The checks come first; CHECKS= leaves them out.
RELEASE := .venv-release
CHECKS  ?= lint types test
release-tools: venv
	@if cmp -s pyproject.toml $(RELEASE)/ready.toml; then exit 0; fi; set -eu; \
	$(PY) -m venv --clear --without-pip $(RELEASE); \
	$(call extra,release) > $(RELEASE)/requirements.txt; \
	$(PY) -m pip --python $(RELEASE)/bin/python install -qq -r $(RELEASE)/requirements.txt; \
	cp pyproject.toml $(RELEASE)/ready.toml

release: release-tools $(CHECKS) ## check, then build wheel, sdist, bill of materials, checksums into dist/ (URL=https://..., CHECKS=)
	@PROJECT_URL=$(URL) deploy/publish/release.sh $(RELEASE)

diagrams: venv ## draw the documents' mermaid diagrams anew, for the site (needs npm and chromium)
	@$(PY) deploy/publish/diagrams.py

proto: venv ## make again what is generated from proto/
	@$(PY) proto/generate.py

bench: venv ## measure this machine
	@$(PY) benchmarks/bench.py $(ARGS)

bench-gpu: venv ## measure this machine's CUDA device (EXTRAS=gpu,train,dev)
	@$(PY) benchmarks/bench_gpu.py $(ARGS)

serve: venv ## serve models/ (ARGS='--grpc-port 0')
	@$(PY) -m forwardpass serve models $(ARGS)

clean: ## remove caches and build outputs
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis benchmarks/out
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

distclean: clean ## remove .venv and the trained versions too
	rm -rf $(VENV) $(TOOLS) $(DOCS) $(RELEASE) models/*/[0-9]* models/*/*.pt
