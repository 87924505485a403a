# Everything a person runs, on a machine with nothing but Python 3.10+ and make.
#   make demo    train a small transformer twice, with the naive formula and with flashtile; writes report.html
#   make test    the checks and the whole test suite; what CI runs
#   make check   ruff, pyright, import-linter and the size report
#   make bench   times the kernels on this machine beside their peers; BENCHMARK=models or io: whole models, traffic
#   make performance   writes docs/performance.md from the results under benchmarks/results/
#   make report  writes out/report.html, the results under benchmarks/results/ as one page
#   make explanation   writes docs/how_it_works.md from the text and the numbers in src/flashtile/report/

PYTHON ?= python3
BENCHMARK ?= kernels
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready-$(shell cksum pyproject.toml requirements-dev.txt | cksum | cut -d ' ' -f 1)

.PHONY: demo test check bench performance support report explanation format clean

demo: $(READY)
	$(BIN)/flashtile demo $(ARGS)

test: check
	$(BIN)/python -m pytest -n 2 --dist load --maxschedchunk 1 $(ARGS)

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/pyright
	$(BIN)/python scripts/size_report.py

bench: $(READY)
	$(BIN)/flashtile bench $(BENCHMARK) $(ARGS)

performance: $(READY)
	$(BIN)/python scripts/performance_page.py

support: $(READY)
	$(BIN)/python scripts/support_page.py

report: $(READY)
	$(BIN)/flashtile report benchmarks/results/*.json --out out/report.html

explanation: $(READY)
	$(BIN)/python scripts/explanation_page.py

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# torch brings its own Triton where it has a GPU build; elsewhere the pinned one serves the interpreter and compiler.
# The newest supported one lies beside it, for the tests that compile every kernel with both.
$(READY):
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --requirement requirements-dev.txt
	$(BIN)/python -c 'import triton' 2>/dev/null || $(BIN)/python -m pip install --quiet --no-deps triton==3.6.0
	$(BIN)/python -m pip install --quiet --no-deps --upgrade --target $(VENV)/triton-newest triton==3.9.0
	$(BIN)/python -m pip install --quiet --no-deps --editable .
	rm -f $(VENV)/.ready-*
	touch $(READY)

clean:
	rm -rf $(VENV) build dist src/*.egg-info report.html
