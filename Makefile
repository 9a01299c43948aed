# make demo: from nothing to a report of a real model. make test: the whole suite. Both need Python 3.11 and nothing else.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test check bench bench-short clean

demo: $(VENV)/.ready
	$(BIN)/affectlens study smollm2-135m --quick

test: $(VENV)/.ready $(VENV)/.peers $(VENV)-vllm/.ready check
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --max-worker-restart=0
	$(VENV)-vllm/bin/python -m pytest tests/contract tests/with_vllm

check: $(VENV)/.ready
	$(BIN)/ruff check src tests bench docs corpus
	$(BIN)/mypy

# Speed beside the peers, which get environments of their own on first use; writes docs/benchmarks.md. Planned for an hour, on a machine that does
# nothing else. Without vLLM the others are measured all the same.
bench: $(VENV)/.ready $(VENV)/.peers
	-$(MAKE) $(VENV)-vllm/.ready
	$(BIN)/python bench

# The same code on tiny models, in a few minutes: does everything still work?
bench-short: $(VENV)/.ready $(VENV)/.peers
	$(BIN)/python bench --short

# torch comes first, so that the builds that pip is set up to prefer (a CPU wheel, a mirror) are taken for it alone.
$(VENV)/.ready: requirements.lock pyproject.toml
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'affectlens needs Python 3.11: make PYTHON=python3.11')"
	$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet torch==2.13.0
	$(BIN)/python -m pip install --quiet --requirement requirements.lock
	$(BIN)/python -m pip install --quiet --no-deps --editable .
	touch $@

# What the tests compare with; without dependencies, because theirs contradict ours.
$(VENV)/.peers: tests/peers.txt $(VENV)/.ready
	$(BIN)/python -m pip install --quiet --no-deps --requirement tests/peers.txt
	touch $@

# vLLM pins its own transformers, so it has an environment of its own (3.5 GB), in which the contract is checked on it. What it brings for
# pictures and sound is built for another torch than a CPU wheel, does not load beside it, and is not needed.
$(VENV)-vllm/.ready: tests/vllm.txt pyproject.toml
	$(PYTHON) -m venv --clear $(VENV)-vllm
	$(VENV)-vllm/bin/python -m pip install --quiet torch==2.13.0
	$(VENV)-vllm/bin/python -m pip install --quiet --requirement tests/vllm.txt
	$(VENV)-vllm/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	$(VENV)-vllm/bin/python -m pip install --quiet --no-deps --editable .
	touch $@

clean:
	rm -rf $(VENV) $(VENV)-vllm .pytest_cache .mypy_cache .ruff_cache
