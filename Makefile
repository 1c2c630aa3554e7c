# Two commands do everything on a fresh clone with Python >= 3.11 and git: make quickstart, make test.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: quickstart test check format bench bench-mini sweep-mini chaos mini clean

quickstart: .venv/installed
	$(BIN)/ditflow mini clips outputs/quickstart/references --seed 1 --count 2 --sprites 1
	$(BIN)/ditflow run jobs/quickstart.yaml jobs/quickstart-bank.yaml jobs/quickstart-reuse.yaml
	@echo
	@echo "Look at: outputs/quickstart/references/*.mp4             where the motion comes from"
	@echo "         outputs/quickstart/synthesize/videos/*.mp4      new videos that were guided by it"
	@echo "         outputs/quickstart/reuse/videos/*.mp4           new videos with a learned motion bank"
	@echo "Page:    $(BIN)/ditflow report outputs/quickstart/synthesize     writes report/index.html there"
	@echo "Ask:     $(BIN)/ditflow manifest show outputs/quickstart/synthesize"
	@echo "         $(BIN)/ditflow bank list outputs/quickstart/bank"

test: .venv/installed .venv-swift/installed
	$(BIN)/python -m pytest

check: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: .venv/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: .venv/installed
	$(BIN)/python -m benchmarks.bench

# Half an hour on 2 cores, and as long again for the sweep of every model.
bench-mini: .venv/installed
	$(BIN)/python -m benchmarks.mini

sweep-mini: .venv/installed
	$(BIN)/python -m benchmarks.mini_sweep

# Half an hour on 2 cores: kills, storms, refusals, a million rows, hostile files, fuzzing.
chaos: .venv/installed .venv-swift/installed
	PYTHONPATH=tests $(BIN)/python -m benchmarks.reliability

# Hours on a CPU, in the background of other work; minutes on a GPU. Stopped and started again, it goes on.
# The models that come out are used by their folders: ditflow transfer --model outputs/mini/mini-rotary ...
mini: .venv/installed
	nice -n 19 $(BIN)/python -m ditflow.mini.training --out outputs/mini

# The constraints pin torch first, so that pip never looks for a newer build of it.
.venv/installed: pyproject.toml constraints.txt
	test -d .venv || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $@

# An S3 server for the tests, in an environment of its own: its packages are not to meet ours.
.venv-swift/installed: tests/swift/requirements.txt
	test -d .venv-swift || $(PYTHON) -m venv .venv-swift
	.venv-swift/bin/python -m pip install --quiet --disable-pip-version-check -r $<
	touch $@

clean:
	rm -rf outputs .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
