# make train: train plain and Block AttnRes on Jane Austen, compare them.  make test: the tests.  Both install first.
# make seeds: three seeds of plain, Block and Full, the page in docs/results/quick.
# make evidence: three seeds of the rows of the paper's Table 4, the pages in docs/results/evidence.
# On a TPU VM: make train LOCK=requirements/tpu.txt.  Another interpreter: make train PYTHON=/path/to/python3.12.
SHELL := /bin/bash
VENV ?= .venv
LOCK ?= requirements/cpu.txt
RUNS ?= runs/quick
RUN := $(VENV)/bin/python
WORKERS ?= 2
TEST := $(RUN) -m pytest -n $(WORKERS) --dist worksteal
# One stamp a lock: another LOCK makes the environment anew.
READY := $(VENV)/.ready-$(basename $(notdir $(LOCK)))
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: train seeds evidence test test-slow test-oldest pipeline-proof lint locks
train: $(READY)
	@for residual in plain block; do \
	  $(RUN) -m attnres_jax train --config=quick:$$residual --workdir=$(RUNS)/$$residual || exit 1; \
	  test -f $(RUNS)/$$residual/eval.json || exit 1; done  # a signal saves and exits 0
	@$(RUN) -m attnres_jax compare $(RUNS)/plain $(RUNS)/block --out=$(RUNS)

seeds: $(READY)
	@for seed in 0 1 2; do for residual in plain block full; do \
	  $(RUN) -m attnres_jax train --config=quick:$$residual --config.seed=$$seed \
	    --workdir=runs/seeds/$$residual-$$seed || exit 1; \
	  test -f runs/seeds/$$residual-$$seed/eval.json || exit 1; done; done
	@$(RUN) -m attnres_jax compare runs/seeds/* --out=docs/results/quick

evidence: $(READY)
	@echo "36 runs, 46 minutes on two cores; stopped, the same command goes on"
	$(RUN) -m attnres_jax sweep table4 --config=evidence --jobs=2 --out=runs/evidence
	@test -f runs/evidence/README.md  # a signal saves and exits 0
	@mkdir -p docs/results/evidence
	@cp runs/evidence/*.md runs/evidence/*.png runs/evidence/comparison.json docs/results/evidence/

test: $(READY)
	$(TEST)

test-slow: $(READY) .libtpu/.ready .triton/.ready
	$(TEST) -m "slow and not libtpu"
	PYTHONPATH=.libtpu $(TEST) -m libtpu
	PYTHONPATH=.triton $(RUN) -c "import triton"  # or its tests would be skipped
	PYTHONPATH=.triton $(TEST) -m "slow or not slow" -k triton tests/test_kernels_gpu.py

test-oldest:
	$(MAKE) test VENV=.venv-oldest LOCK=requirements/oldest.txt
	.venv-oldest/bin/python -m pytest -n $(WORKERS) -m slow tests/test_pipeline.py -k "is_the_model or composes"

# Hours on two cores; goes on where it was stopped.
pipeline-proof: $(READY)
	PYTHONPATH=. $(RUN) tests/pipeline_proof.py --out=docs/results/pipeline

lint: $(READY)
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m basedpyright

# The compiler for TPUs needs no TPU, Triton's interpreter no GPU. Apart from $(VENV): with libtpu there every start of
# JAX would look for a TPU, and Triton is 1 GB.
.libtpu/.ready: requirements/tpu.txt
.triton/.ready: requirements/gpu.txt
.libtpu/.ready .triton/.ready: .%/.ready: | $(READY)
	@rm -rf .$* && mkdir .$* && sed -n '/^$*==/,/[^\\]$$/p' $< > .$*/lock.txt
	@$(RUN) -m pip install --quiet --require-hashes --no-deps --target .$* -r .$*/lock.txt
	@touch $@

# Candidates are run, not looked up: a pyenv shim on PATH may exist and fail.
$(READY): $(LOCK) pyproject.toml
	@for python in $(PYTHON) python3.12 python3.13 python3 $${PYENV_ROOT:-$$HOME/.pyenv}/versions/3.1[2-9].*/bin/python; do \
	  found=$$($$python -c 'import sys; assert sys.version_info >= (3, 12); print(sys.executable, sys.version.split()[0])' 2>/dev/null) && break; done; \
	if [ -z "$$found" ]; then echo "No Python >= 3.12 on PATH or under pyenv. Install one, or name it: make $(MAKECMDGOALS) PYTHON=/path/to/python3.12" >&2; exit 1; fi; \
	echo "Python: $$found; installing $(LOCK) into $(VENV) (about a minute)"; \
	rm -rf $(VENV) && $${found% *} -m venv $(VENV)
	@$(RUN) -m pip install --quiet --require-hashes -r $(LOCK)
	@$(RUN) -m pip install --quiet --no-deps --no-build-isolation --no-index -e .
	@touch $@

# Versions and hashes, no URLs; needs uv. The gpu lock holds JAX 0.11.2, for jax-triton.
COMPILE := uv pip compile --quiet --generate-hashes --universal --python-version 3.12 --no-emit-index-url --no-annotate --no-header
locks:
	$(COMPILE) pyproject.toml --extra test -o requirements/cpu.txt
	$(COMPILE) pyproject.toml --extra test --extra tpu -o requirements/tpu.txt
	$(COMPILE) pyproject.toml --extra test --extra gpu -o requirements/gpu.txt
	$(COMPILE) pyproject.toml requirements/oldest.in --extra test -o requirements/oldest.txt
