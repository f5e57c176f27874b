# `make` lists the targets. Each builds .venv first where it is missing or older than the requirements.
PYTHON  ?= python3
TEACHER ?= wrn28
ARGS    ?=
OUT     ?=
WORKERS ?= 2
GRID    ?= params/grid/table2.yaml
JOBS    ?= 2

BIN   := .venv/bin
READY := .venv/.ok

# Waiting OpenMP threads spin by default: with anything else running, a step takes tens of times longer.
export OMP_WAIT_POLICY := PASSIVE
# The kernel named python3 is .venv's own, whatever kernels the user has installed.
export JUPYTER_PREFER_ENV_PATH := 1
unexport JUPYTER_PATH

# All tables and figures, the ledger of claims last: it reads what the others leave.
NOTEBOOKS := $(patsubst nbs/%.ipynb,%,$(sort $(wildcard nbs/figure*.ipynb nbs/table*.ipynb nbs/protocol.ipynb nbs/theory.ipynb))) claims
# The companion papers'.
COMPANIONS := $(basename $(notdir $(sort $(wildcard nbs/functional/functional_*.ipynb nbs/luminet/luminet_*.ipynb nbs/singer/singer_*.ipynb))))
# Ours, for those who want to use the method, and on its speed. These and the companions are run by name, not by `make tables`.
STUDIES := $(COMPANIONS) track_record deployment benchmark precision recipe
# A recipe line with $(MAKE) itself would run under `make -n` too.
AGAIN := $(MAKE)

# Where notebook NAME lies: a companion's in its paper's folder.
path = $(wildcard nbs/$(1).ipynb nbs/*/$(1).ipynb)
# $(call papermill,NAME,RUN,WORDS): notebook NAME, with WORDS and ARGS for papermill, into outputs/RUN.ipynb unless OUT says where
define papermill
	@mkdir -p outputs "$$(dirname '$(or $(OUT),outputs/$(2).ipynb)')"
	$(BIN)/papermill $(call path,$(1)) '$(or $(OUT),outputs/$(2).ipynb)' $(3) $(ARGS)
	@$(BIN)/python -m nskd.experiments.results
endef

.DEFAULT_GOAL := help
.PHONY: help table2 table4 tables grid test fuzz lab export readme clean distclean
.PHONY: $(NOTEBOOKS) $(STUDIES)

help: ## list the targets
	@echo 'make TARGET [PYTHON=python3] [TEACHER=wrn28] [OUT=...] [ARGS="..."]'
	@awk -F ':.*## ' '/^[a-z0-9]+:.*## /{printf "  %-10s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))
	@echo '  NAME       run one notebook, OUT and ARGS as above: $(STUDIES) (not by "make tables"), $(NOTEBOOKS)'

table2: $(READY) ## run Table 2 with papermill: TEACHER=wrn28, OUT=where to, ARGS="more for papermill"
	$(call papermill,table2,table2-$(TEACHER),-p teacher '$(TEACHER)')

table4: $(READY) ## run Table 4, a hundred classes; TEACHER, OUT and ARGS as above
	$(call papermill,table4,table4-$(TEACHER),-p teacher '$(TEACHER)')

$(filter-out table2 table4 claims,$(NOTEBOOKS)) $(STUDIES): %: $(READY)
	$(call papermill,$*,$*,)

claims: $(READY)
	$(call papermill,claims,claims,-p source fresh -p absent all)

tables: $(READY) ## run every table and figure, one after the other, then the ledger of claims; what was trained before is reused
	@mkdir -p outputs; failed=; began=$$(date +%s); \
	for name in $(NOTEBOOKS); do \
	  start=$$(date +%s); said=; \
	  $(AGAIN) --no-print-directory $$name OUT= >outputs/$$name.log 2>&1 || { failed="$$failed $$name"; said=", failed: see outputs/$$name.log"; }; \
	  echo "$$name: $$(($$(date +%s) - start)) s$$said"; \
	done; \
	echo "all: $$(($$(date +%s) - began)) s"; \
	if [ "$$failed" ]; then echo "error: failed:$$failed" >&2; exit 1; fi

grid: $(READY) ## run a grid of cells with Snakemake: GRID=params/grid/table2.yaml, JOBS=2 side by side, ARGS="more for snakemake"
	PATH="$(CURDIR)/$(BIN):$$PATH" snakemake -s params/Snakefile --config grid='$(GRID)' --cores $(JOBS) --keep-going --rerun-incomplete $(ARGS)

# Notebooks that papermill runs are run by pytest, which looks at what they leave.
test: $(READY) ## run the notebooks as tests, then pytest (ARGS="more for pytest"), WORKERS=2 at a time; either one failing fails it
	@status=0; \
	OMP_NUM_THREADS=1 $(BIN)/nbdev_test --n_workers $(WORKERS) --skip_file_re '^([_.]|($(subst $() ,|,$(strip $(NOTEBOOKS) $(STUDIES) distill)))\.ipynb$$)' || { status=1; notebooks=failed; }; \
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder $(ARGS) || status=1; \
	if [ "$$notebooks" = failed ]; then echo 'error: notebooks failed: their errors stand above what pytest says' >&2; fi; \
	exit $$status

fuzz: $(READY) ## let every loader read 10,000 damaged and hostile files (ARGS="how many")
	$(BIN)/python tests/fuzz.py $(ARGS)

lab: $(READY) ## open the notebooks in JupyterLab
	$(BIN)/jupyter-lab --ServerApp.root_dir=. --LabApp.default_url=/lab/tree/nbs $(ARGS)

export: $(READY) ## make nskd/*.py from the notebooks
	$(BIN)/nbdev_export

readme: $(READY) ## make README.md from nbs/index.ipynb
	$(BIN)/python -m nskd.experiments.readme

clean: ## remove caches and everything in outputs/ except published/ (finished runs too); keep .venv
	if [ -d outputs ]; then find outputs -mindepth 1 -maxdepth 1 ! -name published -exec rm -rf {} +; fi
	find . -path ./.venv -prune -o -type d \( -name __pycache__ -o -name .ipynb_checkpoints \) -prune -exec rm -rf {} +
	rm -rf .pytest_cache .hypothesis build dist _docs _proc *.egg-info

distclean: clean ## clean, and remove .venv
	rm -rf .venv

# .ok is written last, so an install that was interrupted is begun anew, from an empty folder.
$(READY): requirements.txt pyproject.toml
	@$(PYTHON) -c '' 2>/dev/null || \
	  { echo 'error: $(PYTHON) does not run: install Python 3.10 or newer, or say which one with PYTHON=/path/to/python3' >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "error: Python 3.10 or newer is needed, $(PYTHON) is $$($(PYTHON) -V 2>&1): say which one with PYTHON=/path/to/python3" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
	  { echo 'error: $(PYTHON) has no venv module: install it first (Debian, Ubuntu: apt-get install python3-venv)' >&2; exit 1; }
	@if [ -e $@ ]; then echo 'Updating .venv'; rm $@; else echo 'Installing into .venv: about 1.5 GB, some minutes the first time'; \
	  $(PYTHON) -m venv --clear .venv; fi
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -r requirements.txt
	@touch $@
