# The whole study, from a fresh clone: make figures. Needs Python 3.11 or newer and nothing else.
#   PAIR     entry of data/pairs.yaml          PROFILE  smoke, default or paper (notebooks/profiles)
#   CONFIG   with PROFILE=dry: the folder of a model's config.json; random weights of its widths
#   PEERS=1  make bench: compare with eai-sparsify too, installed into an environment of its own
#   ONLY     notebooks by number: ONLY="03 04" ARGS     passed on: ARGS="-p feature 17" with one notebook, "--workers 1"
#   WORKERS  make test and make browser: processes that share out the tests; 0 is none
PYTHON ?= python3
PAIR ?= tiny
PROFILE ?= default
ONLY ?=
CONFIG ?=
ARGS ?=
PEERS ?=
WORKERS ?= 2
BIN := .venv/bin
STAMP := .venv/.installed

export JUPYTER_PREFER_ENV_PATH := 1

.PHONY: help figures study lab explore report check test browser faults test-latest bench canonical clean-runs
.DEFAULT_GOAL := help

help:
	@echo 'make figures [PAIR=tiny] [PROFILE=default] [ONLY="03 04"]   run the notebooks, write figures/ and results'
	@echo 'make study [ONLY="10 11"]                                  what takes hours, notebooks 10 to 13, 16 to 18; also PAIR=smol ONLY=15'
	@echo 'make lab                                                   open the notebooks in JupyterLab'
	@echo 'make explore [PAIR=tiny] [PROFILE=default]                 the features of a run, one by one, in JupyterLab'
	@echo 'make report                                                everything as HTML, to open without a network: data/report'
	@echo 'make check                                                 has any number moved since the committed results?'
	@echo 'make test                                                  run the tests'
	@echo 'make browser                                               the notebooks in a real JupyterLab and Chromium, after make figures PROFILE=smoke'
	@echo 'make faults                                                kills, full disks, damaged files, bad input: is anything lost?'
	@echo 'make test-latest                                           the tests with the newest nnsight, transformers and plotly'
	@echo 'make figures PROFILE=dry CONFIG=FOLDER                     a dry run at true width: no weights, no hub, no GPU (docs/gpu.md)'
	@echo 'bash benchmarks/gpu.sh                                     what a GPU must show, in 8 minutes'
	@echo 'make bench [PEERS=1]                                       measure every claim about speed: benchmarks/results.json'
	@echo 'make canonical                                             strip notebooks/ of what does not belong in git'
	@echo 'make clean-runs [PAIR=tiny]                                remove data/runs/<pair>/: everything is recomputed'

figures: $(STAMP)
ifeq ($(PROFILE),dry)
	@$(BIN)/python -m benchmarks.true_size --dry --config $(CONFIG) $(ARGS)
else
	@$(BIN)/python -m lib figures --pair "$(PAIR)" --profile "$(PROFILE)" --only $(ONLY) $(ARGS)
endif

# Needs what notebooks 01 to 03 leave; goes on where it was interrupted. The notebooks read what it writes.
study: $(STAMP)
	@$(BIN)/python -m lib study --pair "$(PAIR)" --profile "$(PROFILE)" --only $(ONLY) $(ARGS)

lab: $(STAMP)
	$(BIN)/jupyter lab --LabApp.default_url=/lab/tree/notebooks $(ARGS)

explore: $(STAMP)
	@page=$$($(BIN)/python -m lib explore --pair "$(PAIR)" --profile "$(PROFILE)") && $(BIN)/jupyter lab --LabApp.default_url=/lab/tree/$$page $(ARGS)

report: $(STAMP)
	@$(BIN)/python -m lib report $(ARGS)

check: $(STAMP)
	@$(BIN)/python -m lib check $(ARGS)

# A test uses one core. The tests of one file stay together, as they share what they made.
test: $(STAMP)
	$(BIN)/python -m pytest --numprocesses $(WORKERS) --dist loadfile $(ARGS)

browser: $(STAMP)
	$(BIN)/python -m pytest -m browser --numprocesses $(WORKERS) --dist load --maxschedchunk 1 tests/house/test_browser.py $(ARGS)

faults: $(STAMP)
	@$(BIN)/python -m tests.faults --numprocesses $(WORKERS) --dist load $(ARGS)

# An environment of its own with the newest releases of what changes most; everything else as pinned.
test-latest:
	@PYTHON="$(PYTHON)" tests/latest.sh

# Half an hour on an idle machine; one of them alone: .venv/bin/python -m benchmarks.read
bench: $(STAMP) $(if $(PEERS),.venv-peers/.installed)
	$(if $(PEERS),.venv-peers,.venv)/bin/python -m benchmarks.step $(if $(PEERS),--peers)
	@for name in read harvest generate distributed explorer costs; do echo; echo "== benchmarks.$$name"; $(BIN)/python -m benchmarks.$$name || exit 1; done

canonical: $(STAMP)
	@$(BIN)/python -m lib canonical notebooks/*.ipynb

clean-runs:
	@case "$(PAIR)" in ''|.*|*/*) echo 'PAIR must be the name of a pair'; exit 2;; esac
	rm -rf "data/runs/$(PAIR)"

# The environment is made anew whenever what it is made from has changed; the stamp is written last.
$(STAMP): requirements.txt constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or newer is needed, and $(PYTHON) is $$($(PYTHON) --version 2>&1): make PYTHON=/path/to/python3.11 ..." >&2; exit 2; }
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "installing requirements.txt into .venv (minutes, the first time)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt -c constraints.txt
	@touch $@

.venv-peers/.installed: requirements.txt constraints.txt benchmarks/peers.txt
	@test -x .venv-peers/bin/python || $(PYTHON) -m venv .venv-peers
	@echo "installing requirements.txt and benchmarks/peers.txt into .venv-peers"
	@.venv-peers/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt -r benchmarks/peers.txt -c constraints.txt
	@touch $@
