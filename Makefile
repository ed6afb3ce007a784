# The commands of the README. Each sets up .venv by itself; PYTHON names the interpreter to build it from.
PYTHON ?= python3
BIN := .venv/bin
DEEPSPEED := $(BIN)/deepspeed
# Processes that share the test files of `make test`.
JOBS ?= 2

OP_TESTS := $(wildcard tests/test_losses*.py tests/test_reference_divergences.py tests/test_kd_loss_*.py tests/test_mix_*.py tests/test_relation_*.py tests/test_bf16_product.py)
SANITIZE := -fsanitize=address,undefined -fno-sanitize-recover=undefined

.PHONY: demo test test-slow bench demo-teacher quality lint build asan gpu-check venv clean

demo: venv  ## a teacher, three students, a table and a report, in a few minutes
	$(DEEPSPEED) mixkd_fast/train.py --config configs/demo_finetune.json
	$(DEEPSPEED) mixkd_fast/train.py --config configs/demo_kd.json
	$(DEEPSPEED) mixkd_fast/train.py --config configs/demo_mixkd.json
	$(BIN)/mixkd-fast compare runs/demo_finetune runs/demo_kd runs/demo_mixkd --html runs/demo.html
	$(BIN)/python examples/pipeline.py runs/demo_mixkd/student

test: venv  ## the tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadfile --durations=20

test-slow: venv  ## further variants of long tests, which `make test` leaves out
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadfile -m slow

bench: venv  ## measure the fused ops against eager PyTorch, torch.compile and a copy of the same bytes
	$(BIN)/python -m benchmarks all --json runs/bench/ops.json

demo-teacher: venv  ## train the demo's teacher again (its weights are part of the package)
	$(DEEPSPEED) mixkd_fast/train.py --config configs/demo_teacher.json

quality: venv  ## does distillation help? DATA=folder with the GLUE files; PART="--settings rte --seeds 0-4" for a part
	$(BIN)/python -m benchmarks.quality --data "$(DATA)" $(PART)

lint: venv  ## style and types
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $$(find csrc -type f)

build: venv  ## compile the extensions again after a change in csrc/
	$(BIN)/python setup.py build_ext --inplace

asan: venv  ## the op tests on a CPU library built with the address and undefined-behaviour sanitizers
	rm -rf build/asan && mkdir -p build/asan
	cp -r mixkd_fast csrc tests setup.py build_flags.py pyproject.toml README.md LICENSE build/asan/
	rm -f build/asan/mixkd_fast/*.so
	cd build/asan && CFLAGS="$(SANITIZE) -fno-omit-frame-pointer" LDFLAGS="$(SANITIZE)" MIXKD_BUILD=cpu \
	    ../../$(BIN)/python setup.py build_ext --inplace
	cd build/asan && LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libubsan.so)" \
	    ASAN_OPTIONS=detect_leaks=0 MIXKD_REQUIRE=cpu ../../$(BIN)/python -m pytest -q $(OP_TESTS) -k "not compile and not opcheck"

gpu-check: venv  ## on a machine with an NVIDIA GPU: build, test, train, benchmark, sanitize; writes runs/gpu/; ONLY=PART,PART for some
	$(BIN)/python -m benchmarks.gpu_check $(if $(ONLY),--only $(ONLY))

venv:
	@$(PYTHON) .ci/make_venv.py

clean:
	rm -rf .venv build runs *.egg-info
