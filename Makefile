# make study   install, run the notebooks, build the report            (PROFILE=, DATASET=, NOTEBOOKS=)
# make test    install, lint, all tests and all notebooks under nbval
# make help    the rest

PYTHON ?= python3
NOTEBOOKS ?=
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
INSTALLED_PEERS := $(VENV)/.installed-peers
INSTALLED_SITE := $(VENV)/.installed-site
INSTALLED_RAY := $(VENV)/.installed-ray

.PHONY: help study test lab figures report publish site bench soak golden gpu-check clean
.DEFAULT_GOAL := help

help:
	@echo "make study     run the notebooks and build the report (PROFILE=smoke|quick|long|full,"
	@echo "               DATASET=name or folder, NOTEBOOKS=\"01 02\" for some of them)"
	@echo "make test      lint, unit tests, and every notebook compared with its outputs"
	@echo "make lab       open JupyterLab in notebooks/"
	@echo "make figures   figures, tables and report on photographs again, from the published runs"
	@echo "make report    build the report of a study that has run"
	@echo "make bench     measure speed against reference loops and peer libraries"
	@echo "make gpu-check measure, repeat, kill and compare on a GPU; writes benchmarks/GPU.md"
	@echo "make soak      kill trainings about 100 times and compare with uninterrupted ones"
	@echo "make golden    compare weights, maps and fingerprints with the golden record"
	@echo "make publish   run the study; replace notebooks/, report.pdf and README tables by it,"
	@echo "               and put its runs into analysis/<set>/runs/, where others find them"
	@echo "make site      build the website from what is published, into site/build/html"
	@echo "make clean     remove the environment (runs and results stay)"

$(INSTALLED): requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info; v >= (3, 10) or sys.exit(f"Python {v.major}.{v.minor} found, 3.10 or newer needed: make PYTHON=python3.12 ...")'
	@echo "installing into $(VENV): some gigabytes, a few minutes"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	@touch $@

$(INSTALLED_PEERS): $(INSTALLED) requirements-peers.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-peers.txt
	@touch $@

$(INSTALLED_RAY): $(INSTALLED) pyproject.toml
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[ray]"
	@touch $@

# Without the study's own packages, which the site doesn't need.
$(INSTALLED_SITE): requirements-site.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-site.txt
	@touch $@

study: $(if $(filter ray,$(EXECUTOR)),$(INSTALLED_RAY),$(INSTALLED))
	$(BIN)/python -m helpers.notebooks $(NOTEBOOKS)
	$(if $(NOTEBOOKS),@echo "When all notebooks have run: make report $(foreach v,PROFILE DATASET ANALYSIS_DIR,$(if $($v),$v=\"$($v)\"))",$(BIN)/python report/build.py)

test: $(INSTALLED_PEERS)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/deptry .
	$(BIN)/python -m pytest --nbval -n auto -q --durations=15

lab: $(INSTALLED)
	$(BIN)/jupyter lab --notebook-dir=notebooks

# The images are needed, but no training.
figures: $(INSTALLED)
	PROFILE=long DATASET=cifar10-jpeg $(BIN)/python -m helpers.notebooks
	PROFILE=long DATASET=cifar10-jpeg $(BIN)/python report/build.py

report: $(INSTALLED)
	$(BIN)/python report/build.py

publish: $(INSTALLED)
	PUBLISH=yes $(BIN)/python -m helpers.notebooks --publish
	$(BIN)/python report/build.py --publish

site: $(INSTALLED_SITE)
	rm -rf site/build
	$(BIN)/sphinx-build --quiet --fail-on-warning --keep-going -d site/build/doctrees site site/build/html
	$(BIN)/python site/check_links.py site/build/html

bench: $(INSTALLED_PEERS)
	$(BIN)/python -m benchmarks

soak: $(INSTALLED)
	for round in 1 2 3 4 5 6 7 8; do $(BIN)/python -m pytest -q tests/test_resume.py -k killed || exit 1; done

gpu-check: $(INSTALLED)
	$(BIN)/python -m benchmarks.gpu

golden: $(INSTALLED)
	$(BIN)/python -m benchmarks.golden

clean:
	rm -rf $(VENV)
