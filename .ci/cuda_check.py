"""Compile and link the CUDA sources for every GPU they are made for, and fail if a hot kernel spills registers.

Needs nvcc and the installed torch (a CPU build will do), no GPU; without nvcc it says so and succeeds. What the kernels
do on a GPU is tested by tests/test_cuda_*.py.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import build_flags

_SPREAD = "FORWARD_KL|REVERSE_KL|JSD|SKEW_FORWARD_KL|SKEW_REVERSE_KL|ALPHA_BETA"
# Kernels whose speed is promised, and where. A spilled register is a trip to memory for every class of every row.
HOT = [
    rf"cluster_kernel<({_SPREAD}), (BF16|F16), \d+> sm_90",
    rf"split_kernel<({_SPREAD}), (BF16|F16)> sm_\d+",
    rf"row_kernel<({_SPREAD}), (BF16|F16)> sm_\d+",
    rf"narrow_kernel<({_SPREAD}), \d+, \d+> sm_\d+",
    r"scale_kernel<\w+> sm_\d+",
    r"mix_forward_kernel<[\w:]+, \d+> sm_\d+",
    r"mix_norm_backward_kernel<[\w:]+, \d+> sm_\d+",
    r"sum_runs_kernel<[\w:]+, [\w:]+, \d+> sm_\d+",
]
# What libtorch_cuda holds, which a CPU build of torch has not.
FROM_TORCH_CUDA = re.compile(r"aoti_torch_\w*cuda\w*")
ENUMS = {
    "Divergence": "csrc/distill_math.h",
    "Format": "csrc/cuda/kd_common.cuh",
    "Dtype": "csrc/cuda/kd_common.cuh",
}


class Compiled(NamedTuple):
    """What came of one source file."""

    source: str
    target: Path
    exit_code: int
    log: str
    user_s: float


class Kernel(NamedTuple):
    """What ptxas says of one kernel on one architecture."""

    name: str
    architecture: str
    registers: int
    shared_bytes: int
    spill_bytes: int

    def is_like(self, pattern: str) -> bool:
        """Whether a pattern of HOT means this kernel."""
        return re.fullmatch(pattern, f"{self.name} {self.architecture}") is not None


def main() -> int:
    """The exit code: 0 if everything compiles, links and no hot kernel spills, or if there is no nvcc."""
    if shutil.which("nvcc") is None:
        print("nvcc not found: CUDA sources not compiled")
        return 0
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        compiled = list(pool.map(lambda source: compile_one(source, Path(folder)), build_flags.cuda_sources()))
        for file in compiled:
            print(f"{file.source:36} {file.user_s:6.1f} s")
            print("".join(f"  {line}\n" for line in file.log.splitlines() if re.search("warning|error", line)), end="")
        failed = [file for file in compiled if file.exit_code != 0]
        if failed:
            print(*(file.log for file in failed), sep="\n", file=sys.stderr)
            return 1
        problem = link([file.target for file in compiled], Path(folder))
        if problem:
            print(problem, file=sys.stderr)
            return 1
    print(
        f"compiled and linked in {time.perf_counter() - start:.0f} s ({sum(f.user_s for f in compiled):.0f} s of CPU)\n"
    )
    return report(kernels_in("".join(file.log for file in compiled)))


def compile_one(source: str, folder: Path) -> Compiled:
    """Machine code for every architecture and PTX, with the resources of each kernel in the log."""
    target = folder / f"{Path(source).stem}.o"
    includes = [argument for path in build_flags.include_dirs() for argument in ("-I", path)]
    command = ["nvcc", *build_flags.NVCC_FLAGS, *build_flags.GENCODE, "-Xptxas", "-v", *includes, "-c", source]
    with (folder / f"{target.stem}.log").open("w+") as log:
        process = subprocess.Popen([*command, "-o", str(target)], cwd=build_flags.ROOT, stdout=log, stderr=log)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        log.seek(0)
        return Compiled(source, target, process.returncode, log.read(), usage.ru_utime)


def link(objects: list[Path], folder: Path) -> str:
    """One library of all objects; returns what is missing, or ""."""
    command = [
        "nvcc",
        "-shared",
        *map(str, objects),
        "-o",
        str(folder / "cuda.so"),
        "-L",
        build_flags.torch_library_dir(),
    ]
    libraries = ["-ltorch", "-ltorch_cpu", "-lc10"]
    # A shared library may leave names open: one that nobody defines would be found only when a GPU machine loads it.
    strict = ["-Xlinker", "-z", "-Xlinker", "defs", "-Xlinker", "--warn-unresolved-symbols"]
    done = subprocess.run([*command, *libraries, *strict], capture_output=True, text=True)
    missing = set(re.findall(r"undefined reference to [`'](.+?)'", done.stderr))
    if done.returncode != 0:
        return done.stderr
    return "\n".join(f"defined nowhere: {name}" for name in sorted(missing) if not FROM_TORCH_CUDA.fullmatch(name))


def kernels_in(log: str) -> list[Kernel]:
    """The kernels of a compilation's log, by readable names."""
    entry = re.compile(
        r"Compiling entry function '(?P<name>\S+)' for '(?P<architecture>\w+)'.*?"
        r"(?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
        r"Used (?P<registers>\d+) registers(?P<rest>[^\n]*)",
        re.DOTALL,
    )
    found = list(entry.finditer(log))
    names = readable([match["name"] for match in found])
    kernels = []
    for match, name in zip(found, names, strict=True):
        shared = re.search(r"(\d+) bytes smem", match["rest"])
        spilled = int(match["stores"]) + int(match["loads"])
        shared_bytes = int(shared[1]) if shared else 0
        kernels.append(Kernel(name, match["architecture"], int(match["registers"]), shared_bytes, spilled))
    return kernels


def readable(names: list[str]) -> list[str]:
    """`row_kernel<JSD, BF16>` for a mangled name."""
    listed = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True).stdout
    enumerators = {name: enumerators_of(name, path) for name, path in ENUMS.items()}

    def member(match: re.Match[str]) -> str:
        known = enumerators.get(match[1].rpartition("::")[2], [])
        return known[int(match[2])] if int(match[2]) < len(known) else match[2]

    short = []
    for name in listed.splitlines():
        call = re.search(r"(\w+_kernel(?:<.*>)?)\(", name)
        short.append(re.sub(r"\(([\w:]+)\)(\d+)", member, call[1] if call else name))
    return short


def enumerators_of(name: str, path: str) -> list[str]:
    """The names of an enum class, in order."""
    text = (build_flags.ROOT / path).read_text()
    body = re.search(rf"enum class {name} : int \{{(.*?)\}}", text, re.DOTALL)
    if body is None:
        raise ValueError(f"{path} has no enum class {name}")
    return re.findall(r"\w+", body[1])


def report(kernels: list[Kernel]) -> int:
    """Print the hot kernels; 1 if one of them spills, or a pattern fits none."""
    print(f"{'kernel':52} {'gpu':6} {'registers':>9} {'shared B':>9} {'spill B':>8}")
    hot = [kernel for kernel in kernels if any(kernel.is_like(pattern) for pattern in HOT)]
    for kernel in sorted(hot):
        name, architecture, registers, shared_bytes, spill_bytes = kernel
        print(f"{name:52} {architecture:6} {registers:9} {shared_bytes:9} {spill_bytes:8}")
    others = [kernel for kernel in kernels if kernel not in hot]
    print(f"and {len(others)} other kernels", end="")
    print(*(f", {k.name} on {k.architecture} spills {k.spill_bytes} bytes" for k in others if k.spill_bytes), sep="")
    spilled = [kernel for kernel in hot if kernel.spill_bytes > 0]
    unmatched = [pattern for pattern in HOT if not any(kernel.is_like(pattern) for kernel in kernels)]
    for kernel in spilled:
        print(f"{kernel.name} on {kernel.architecture} spills {kernel.spill_bytes} bytes", file=sys.stderr)
    for pattern in unmatched:
        print(f"no kernel is called {pattern}", file=sys.stderr)
    return 1 if spilled or unmatched else 0


if __name__ == "__main__":
    sys.exit(main())
