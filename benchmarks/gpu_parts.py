"""The parts of `make gpu-check`: what each one runs, how long it may take, what it cannot do without."""

from typing import NamedTuple

OP_TESTS = (
    "tests/test_cuda_*.py tests/test_triton_*.py tests/test_linear_*.py tests/test_relation_*.py tests/test_mix_*.py "
    "tests/test_kd_loss_*.py tests/test_losses*.py tests/test_reference_divergences.py tests/test_fused_encoder.py "
    "tests/test_small_cases.py"
)
"""Of every op on every backend, with graph capture."""
WITHOUT_GPU = "not machine_code and not host_math"
"""Compilers' tests, which `make test-slow` and `make test` run on any machine."""
SANITIZED = "tests/test_small_cases.py"
OUR_KERNELS = (
    *("mixkd", "kd_loss_", "adaptive_shares_kernel", "statistics_kernel", "gradient_kernel"),
    *("forward_kernel", "norm_backward_kernel", "sum_runs_kernel", "join_runs_kernel"),
)
"""In the names of this project's kernels, of CUDA and of Triton. Others are torch's, and there are many."""
OPS = {"kd_loss": 75, "linear_kd_loss": 60, "mix_embeddings": 45, "relation_kl": 55}
"""Seconds for the short benchmark of each op."""


class Part(NamedTuple):
    """A shell command and the seconds it may take.

    In the command, {seconds} becomes the time after which a benchmark should start nothing new, {tested} what the tests
    of the ops said, {junit} a file for the outcome of every test: the part then fails if a file of tests is skipped
    altogether. `needs`: a program without which the part cannot run. Neighbours with the same `beside` run at once.
    """

    command: str
    limit_s: int
    needs: str = ""
    beside: str = ""


def parts(python: str, out: str) -> dict[str, Part]:
    """Every part, the most important first; `python` and `out` as they stand in a shell command."""
    pytest = f"{python} -m pytest -q --junitxml {{junit}} -m ''"
    limited = "--stop-after {seconds} --tested {tested}"
    found = {
        "build": Part(f"MIXKD_BUILD=cuda {python} setup.py build_ext --inplace", 150, "nvcc"),
        "backends": Part(f"{python} -m benchmarks.gpu_backends", 30),
        "op_tests": Part(
            f"MIXKD_REQUIRE=cpu {pytest} -n auto --maxprocesses 8 --dist worksteal -k '{WITHOUT_GPU}' {OP_TESTS}",
            200,
            beside="correctness",
        ),
        "training": Part(f"{python} -m benchmarks.gpu_training --json {out}/training.json", 200, beside="correctness"),
        "train_step": Part(
            f"{python} -m benchmarks train_step --device cuda --models bert-large,bert-base --rows 4096 --rounds 1 "
            f"{limited} --json {out}/train_step.json",
            150,
        ),
    }
    for op, limit in OPS.items():
        command = f"{python} -m benchmarks {op} --device cuda --short --seconds 2 --no-tests {limited}"
        found[op] = Part(f"{command} --json {out}/{op}.json", limit)
    for name in ("deepspeed_overhead", "teacher_precision"):
        found[name] = Part(f"{python} -m benchmarks.{name} --device cuda --json {out}/{name}.json", 60)
    for tool in ("memcheck", "racecheck", "initcheck"):
        command = f"{sanitizer(tool)} {pytest} -p no:xdist {SANITIZED}"
        found[tool] = Part(command, 150, "compute-sanitizer", beside="sanitizers")
    plan = f"{python} -m benchmarks.plan_check --device cuda --precision bf16 --batching length"
    found["plan_check"] = Part(f"{plan} --json {out}/plan_check.json", 60)
    return found


def sanitizer(tool: str) -> str:
    """compute-sanitizer before a command. Every tensor is memory of its own: what lies outside one is then outside."""
    options = f"--tool {tool} --error-exitcode 1 --target-processes application-only"
    if tool == "memcheck":
        options += " --report-api-errors no"  # torch asks for things that may be absent
    if tool != "initcheck":  # which has to see who writes what our kernels read
        options += "".join(f" --kernel-name kns={name}" for name in OUR_KERNELS)
    return f"PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer {options}"
