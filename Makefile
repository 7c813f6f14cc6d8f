# make demo    set up, then `plainconv compare` on the data that comes with the libraries; the report is out/report.html
# make test    set up, then the quick tests
# make check   everything slow: lint, format, types, the slow tests, the wheel in a clean environment
# make bench   every suite beside torch, forward in three types, and training, what compiling takes, and Gaussians beside
#              OpenCV and SciPy, which it installs: the tables under results/ (about an hour; it measures what has no
#              record yet, or with AGAIN=--again everything)
# make models  whole models beside torch.compile, ONNX Runtime and OpenVINO: results/models.md (15 minutes; it installs
#              transformers and the others first)
# make fit     fit the estimates that rank algorithms to the records of make bench
# make format  put the code in its form
# make clean   remove what builds and tools left (not .venv)

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
SPREAD := -n auto --dist loadfile

.DEFAULT_GOAL := demo
.PHONY: demo test check lint slow wheel bench models fit format clean

demo: $(STAMP)
	$(BIN)/plainconv compare

test: $(STAMP)
	$(BIN)/pytest -m "not slow" $(SPREAD)

check: lint slow wheel

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

slow: $(STAMP)
	$(BIN)/pytest -m slow $(SPREAD)

wheel: $(STAMP)
	.ci/wheel $(BIN)/python

bench: $(STAMP)
	$(BIN)/python benchmarks/compile.py
	$(BIN)/python benchmarks/tables.py $(AGAIN)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[all,gaussians]"
	$(BIN)/python benchmarks/gaussians.py
	$(BIN)/python benchmarks/readme.py

models: $(STAMP)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[all,models]"
	$(BIN)/python benchmarks/models.py

fit: $(STAMP)
	$(BIN)/python benchmarks/fit.py

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf build dist out .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find plainconv tests docs -name __pycache__ -type d -prune -exec rm -rf {} +

# One virtual environment, made again whenever the dependencies change.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 11) and "plainconv needs Python 3.11 or newer; $(PYTHON) is %d.%d. Choose another: make PYTHON=python3.12 ..." % v[:2])'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[all]"
	@touch $@
