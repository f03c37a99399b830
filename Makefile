# make reports               train what is missing, execute the experiments, write reports/index.html
# make reports FRESH=1       the same from nothing, into reports/fresh, beside the committed results
# make reports SYSTEMS=all   with the fourteen other systems of Table 1
# make test                  notebooks and package in sync, linter, notebook tests, pytest, a smoke run of every experiment; how much of pcan/ pytest ran
# make verify               one cheap run of each table again, compared with the committed result; TABLES=systems chooses
# make test-site             the committed pages and that of pcan_demo in a browser (needs Chromium): console, requests, pictures, links, phone, dark, paper
# make pose-env             the environment of its own that pcan_pose wants (mmpose, numpy below 2): .venv-pose, 1.6 GB
# make test-pose            poses of a short synthetic video by a real whole-body model with random weights; makes the environment if missing
# make test-slow             every system at the paper's size, forward and backward: minutes
PROFILE ?= quick
PYTHON  ?= python3
VENV    ?= .venv
POSE    ?= .venv-pose
BIN     := $(VENV)/bin
JOBS    ?= $(shell nproc 2>/dev/null || echo 2)
LEAST   ?= 85

.PHONY: help install reports verify test test-slow test-site pose-env test-pose notebooks readme data clean
help:
	@grep '^# make' Makefile | cut -c3-

# absolute: commands that tests start elsewhere count too
COVER   = COVERAGE_FILE=$(CURDIR)/.coverage $(BIN)/python -m coverage

install: $(VENV)/.installed
$(VENV)/.installed: constraints.txt settings.ini setup.py
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt setuptools wheel
	$(BIN)/python -m pip install -q -c constraints.txt --no-build-isolation -e ".[dev]"
	touch $@

# the three packages of OpenMMLab come without what they ask for, of which a part has to be compiled and none of it is used here;
# what they do import stands in settings.ini (pose_requirements), and pcan/pose.py says what takes the place of the rest
pose-env: $(POSE)/.installed
$(POSE)/.installed: constraints-pose.txt settings.ini setup.py
	test -x $(POSE)/bin/python || $(PYTHON) -m venv $(POSE)
	$(POSE)/bin/python -m pip install -q -c constraints-pose.txt setuptools wheel
	$(POSE)/bin/python -m pip install -q -c constraints-pose.txt --no-build-isolation -e ".[pose]"
	$(POSE)/bin/python -m pip install -q -c constraints-pose.txt --no-deps mmpose mmengine mmcv-lite
	touch $@

reports: install
	$(BIN)/nbdev_export
	$(BIN)/pcan_report --profile $(PROFILE) $(if $(SYSTEMS),--systems $(SYSTEMS)) $(if $(FRESH),--fresh)

verify: install
	$(BIN)/pcan_verify --profile $(PROFILE) $(if $(TABLES),--tables $(TABLES))

data: install
	$(BIN)/pcan_synth $(PROFILE)

test: install
	OMP_NUM_THREADS=1 $(BIN)/nbdev_test --n_workers $(JOBS) --do_print
	rm -f .coverage .coverage.*
	$(COVER) run -m pytest
	@find . -maxdepth 1 -name '.coverage.*' -size 0 -delete
	@$(COVER) combine -q
	@echo "Least covered by pytest:"; $(COVER) report --sort=cover | sed -n '1p;3,7p'
	@echo "Percent of pcan/ (at least $(LEAST)):"; $(COVER) report --format=total --fail-under=$(LEAST)

test-slow: install
	OMP_NUM_THREADS=$(JOBS) $(BIN)/python -m pytest -m slow

test-pose: install pose-env
	OMP_NUM_THREADS=$(JOBS) $(BIN)/python -m pytest -m pose

test-site: install
	$(BIN)/python -m pytest -m site

readme: install
	$(BIN)/python -m pcan.docs

clean:
	rm -rf data/cache data/synth reports/smoke reports/fresh
