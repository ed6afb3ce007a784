# The commands of the README. Each sets up .venv by itself; PYTHON names the interpreter to build it from.
PYTHON ?= python3
BIN := .venv/bin
DEEPSPEED := $(BIN)/deepspeed

.PHONY: demo test demo-teacher quality lint venv clean

demo: venv  ## a teacher, three students, a table and a report, in a few minutes
	$(DEEPSPEED) mixkd_fast/train.py --config configs/demo_finetune.json
	$(DEEPSPEED) mixkd_fast/train.py --config configs/demo_kd.json
	$(DEEPSPEED) mixkd_fast/train.py --config configs/demo_mixkd.json
	$(BIN)/mixkd-fast compare runs/demo_finetune runs/demo_kd runs/demo_mixkd --html runs/demo.html
	$(BIN)/python examples/pipeline.py runs/demo_mixkd/student

test: venv  ## every test
	$(BIN)/python -m pytest

demo-teacher: venv  ## train the demo's teacher again (its weights are part of the package)
	$(DEEPSPEED) mixkd_fast/train.py --config configs/demo_teacher.json

quality: venv  ## fine-tuning, KD and MixKD on MNLI, SST-2 and RTE: DATA=folder with the GLUE files
	$(BIN)/python -m benchmarks.quality --data "$(DATA)"

lint: venv  ## style and types
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

venv:
	@$(PYTHON) .ci/make_venv.py

clean:
	rm -rf .venv build runs *.egg-info
