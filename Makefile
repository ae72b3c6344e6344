# On a machine with Python 3.11+ and make: `make demo` or `make test`; both do all set-up. PYTHON picks the interpreter.
PYTHON ?= python3
BIN := .venv/bin
INSTALL := $(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e
# What pip says is shown where it fails only.
QUIETLY := > .venv/pip.log 2>&1 || { cat .venv/pip.log >&2; exit 1; }

.PHONY: demo announce test fuzz check lint bundle
.DEFAULT_GOAL := demo

# One stamp file for each set of dependencies, so that further runs start at once.
.venv/pyvenv.cfg:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=...")'
	@$(PYTHON) -m venv .venv

.venv/.runtime: pyproject.toml constraints.txt | .venv/pyvenv.cfg
	@echo "installing the runtime dependencies into .venv (some minutes the first time; 5.6 GB on Linux, CUDA included)"
	@$(INSTALL) '.' $(QUIETLY)
	@touch $@

.venv/.dev: .venv/.runtime
	@echo "installing the development tools into .venv"
	@$(INSTALL) '.[dev]' $(QUIETLY)
	@touch $@

# What pip has to install comes after the announcement.
demo: announce .venv/.runtime
	$(BIN)/python train/filter.py fit
	$(BIN)/python eval/bench.py --config configs/eval/demo.yaml
	@$(BIN)/python eval/demo.py

announce:
	@echo "The picture at the end will be runs/demo/bench.png. On two idle cores, beside what has to be installed:"
	@echo "  3 minutes  64 + 32 + 32 prompts are decoded token by token and by the oracle, every step is labelled, and a"
	@echo "             filter is trained on them, compared and exported to exports/filter"
	@echo "  2 minutes  24 test prompts are decoded with and without it, side by side"
	@echo "Interrupt it at any time; the same command continues."

test: .venv/.dev
	$(BIN)/python -m pytest -m "not slow and not gpu and not network"

# Hostile input and a hundred kills; `make test` has all of it but the kills.
fuzz: .venv/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not gpu and not network" tests/fuzz tests/data/test_shards.py

lint: .venv/.dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/basedpyright
	$(BIN)/lint-imports

check: lint test

# Everything that ships: the base model, the prompts, the filter, the helper and the EoT head. Ten minutes on an H200 with 16 cores, many
# hours on two cores.
bundle: .venv/.runtime
	$(BIN)/python train/base.py fit --config configs/base/order.yaml --data.workers 4
	$(BIN)/python train/base.py export --checkpoint runs/base-order/checkpoints/last.ckpt --tokenizer runs/base/tokenizer \
		--out runs/base-order/model
	$(BIN)/python train/base.py fit --model.start runs/base-order/model --data.workers 4
	$(BIN)/python train/base.py export --checkpoint runs/base/checkpoints/last.ckpt --tokenizer runs/base/tokenizer \
		--out models/bundled/llada-tiny
	$(BIN)/python data/make_bundle.py
	$(BIN)/python eval/card.py --training "One run of the two recipes below, by \`make bundle\`."
	$(BIN)/python train/filter.py fit --config configs/filter/bundled.yaml
	$(BIN)/python eval/risk.py --strategy learn2pd --options '{"filter": "models/bundled/filter-llada-tiny"}' \
		--values "[0.99, 0.98, 0.95, 0.9, 0.85, 0.8]"
	$(BIN)/python train/helper.py fit --config configs/helper/bundled.yaml
	$(BIN)/python eval/risk.py --strategy apd --options '{"helper": "models/bundled/helper-llada-tiny"}' \
		--values "[0, 0.25, 0.5, 0.7, 0.85]"
	$(BIN)/python train/rollout.py predict --config configs/rollout/eot.yaml
	$(BIN)/python train/eot.py --rollouts runs/rollout/eot --out models/bundled/eot-llada-tiny
