# `make quickstart` and `make test` need Python 3.11 or newer and nothing else: they make their own environment.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

export TOKENIZERS_PARALLELISM ?= false

.PHONY: quickstart test test-vllm test-transformers check sanitize scan audit docs bench clean

quickstart: $(READY)
	$(BIN)/steersman quickstart

# Three processes of one thread each: on tiny models more threads only wait for each other, and where a test waits for a
# rank, a server or a clock, two of them leave a seventh of two cores idle. Each takes a file at a time, so that what a
# file's tests share is made once; compiled files are kept.
TESTS := PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest \
	-n 3 --dist loadfile --no-loadscope-reorder
test: $(READY)
	$(TESTS)

check: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(TESTS) -m "not slow and not vllm"

# Needs an environment with vLLM (benchmarks/README.md); STEERSMAN_VLLM_PYTHON names its Python.
test-vllm: $(READY)
	test -x "$${STEERSMAN_VLLM_PYTHON:-../env/vllm/bin/python}" || { echo "needs vLLM: name its Python in STEERSMAN_VLLM_PYTHON" >&2; exit 1; }
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -m vllm tests/rollout/remote

# With the oldest and the newest transformers of pyproject's range, each in a folder of its own; minutes each.
test-transformers: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python tools/transformers_versions.py

# The compiled loops with every access checked, under gcc's AddressSanitizer and UBSan; torch itself is not checked.
# libstdc++ is preloaded too, since the sanitizer looks for it only once, and Python comes without it.
SANITIZED := tests/native tests/model/test_attention.py tests/model/test_fused.py \
	tests/rollout/test_native.py tests/rollout/test_packed.py tests/rollout/test_compiled_step.py
sanitize: $(READY)
	@test -f "$$($(CXX) -print-file-name=libasan.so)" || { echo "$(CXX) has no AddressSanitizer; try: make sanitize CXX=g++"; exit 1; }
	export CXX=$(CXX) STEERSMAN_NATIVE=sanitize OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 \
		ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
		LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so.6)"; \
	$(BIN)/python -c 'from steersman import native; native.library() or exit(native.why_not())' && \
	$(BIN)/python -m pytest -q $(SANITIZED)

# Random requests against the servers that people and their programs reach.
scan: $(READY)
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python tools/scan.py

# Known weaknesses of the pinned packages. The advisories are on the network; pip-audit has an environment of its own.
audit:
	test -x build/audit/bin/pip-audit || { $(PYTHON) -m venv build/audit && build/audit/bin/pip install --quiet pip-audit; }
	build/audit/bin/pip-audit --requirement constraints.txt --no-deps --disable-pip || { \
		echo "make audit: what is listed above has a known weakness; where nothing is listed, the advisories on the network could not be reached, and nothing was checked"; exit 1; }

# A link or a name that leads nowhere is an error. The site is in build/site.
docs: $(READY)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

bench: $(READY)
	$(BIN)/python benchmarks/run_all.py

# The stamp comes last, so an interrupted installation is taken up again; --clear would throw it away.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 11) and "steersman needs Python 3.11 or newer; this is %d.%d. Try: make PYTHON=python3.11" % v[:2])'
	test -x $(BIN)/python -a -x $(BIN)/pip || $(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $(READY)

clean:
	rm -rf $(VENV)
