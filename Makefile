# make reports               train what is missing, execute the experiments, write reports/index.html
# make reports FRESH=1       the same from nothing, into reports/fresh, beside the committed results
# make reports SYSTEMS=all   with the fourteen other systems of Table 1
# make test                  notebooks and package in sync, linter, notebook tests, pytest, a smoke run of every experiment; how much of pcan/ pytest ran
# make speed                how fast everything is beside the reference's algorithm, on this machine: the page Speed of profile bench
# make verify               one cheap run of each table again, compared with the committed result; TABLES=systems chooses
# make test-site             the committed pages and that of pcan_demo in a browser (needs Chromium): console, requests, pictures, links, phone, dark, paper
# make pose-env             the environment of its own that pcan_pose wants (mmpose, numpy below 2): .venv-pose, 1.6 GB
# make test-pose            poses of a short synthetic video by a real whole-body model with random weights; makes the environment if missing
# make test-faults           runs killed at twenty moments, disks that fill up, files cut short: what is finished stays, the rest goes on; writes reports/faults.csv
# make test-fuzz             wrong files of every kind, a minute of them: refused by a sentence, or right; FUZZ_SECONDS=600 looks longer
# make test-compat           the tests on the oldest versions we promise (Python 3.11, numpy 1.26) and the newest (3.12), in environments of their own; the wheel used in an empty folder
# make test-slow             every system at the paper's size, forward and backward: minutes
PROFILE ?= quick
PYTHON  ?= python3
VENV    ?= .venv
POSE    ?= .venv-pose
OLDEST  ?= .venv-py311-numpy1
NEWEST  ?= .venv-py312-numpy2
PYTHON311 ?= python3.11
PYTHON312 ?= python3.12
BIN     := $(VENV)/bin
JOBS    ?= $(shell nproc 2>/dev/null || echo 2)
LEAST   ?= 85

.PHONY: help install reports speed verify test test-slow test-site test-faults test-fuzz test-compat pose-env test-pose notebooks readme data clean
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

# the lowest versions that settings.ini promises, and those of constraints.txt on the newest Python
$(OLDEST)/.installed: PYTHON := $(PYTHON311)
$(OLDEST)/.installed: PINS := constraints-oldest.txt
$(NEWEST)/.installed: PYTHON := $(PYTHON312)
$(NEWEST)/.installed: PINS := constraints.txt
$(OLDEST)/.installed: constraints-oldest.txt settings.ini setup.py
$(NEWEST)/.installed: constraints.txt settings.ini setup.py
$(OLDEST)/.installed $(NEWEST)/.installed:
	test -x $(@D)/bin/python || $(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install -q -c $(PINS) setuptools wheel
	$(@D)/bin/python -m pip install -q -c $(PINS) --no-build-isolation -e ".[dev]"
	$(@D)/bin/python -m pip check
	touch $@

reports: install
	$(BIN)/nbdev_export
	$(BIN)/pcan_report --profile $(PROFILE) $(if $(SYSTEMS),--systems $(SYSTEMS)) $(if $(FRESH),--fresh)

speed: install
	$(BIN)/nbdev_export
	$(BIN)/pcan_report --profile bench --only speed

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

test-faults: install
	PCAN_FAULTS=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/test_faults.py -m ""

test-fuzz: install
	OMP_NUM_THREADS=1 $(if $(FUZZ_SECONDS),FUZZ_SECONDS=$(FUZZ_SECONDS)) $(BIN)/python -m pytest -m fuzz -rP

# pytest without the pages' smoke runs, the committed results and the sync of notebooks: these speak of the repository, not of versions
test-compat: install $(OLDEST)/.installed $(NEWEST)/.installed
	for e in $(OLDEST) $(NEWEST); do PATH="$(CURDIR)/$$e/bin:$$PATH" OMP_NUM_THREADS=1 $$e/bin/python -m pytest -p no:cacheprovider \
	  --ignore tests/test_experiments.py --ignore tests/test_committed.py --ignore tests/test_sync.py || exit 1; done
	$(BIN)/python -m pytest -m compat

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
