"""What the extensions are compiled from and with: shared by setup.py and .ci/cuda_check.py."""

import importlib.util
from pathlib import Path

ROOT = Path(__file__).resolve().parent
# The stable C++ interface of torch 2.11: one binary serves it and every later torch, under every Python.
TORCH_DEFINES = ["-DTORCH_TARGET_VERSION=0x020b000000000000"]
CPU_FLAGS = [
    "-O3",
    "-g0",
    "-std=c++17",
    "-fPIC",
    "-fopenmp-simd",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fvisibility=hidden",
    *TORCH_DEFINES,
]
NVCC_FLAGS = ["-O3", "-std=c++17", "-Xcompiler=-fPIC,-fvisibility=hidden", "-DUSE_CUDA", *TORCH_DEFINES]
# Machine code of A100 and H100/H200, and PTX that later GPUs compile for themselves.
GENCODE = [
    "-gencode=arch=compute_80,code=sm_80",
    "-gencode=arch=compute_90,code=sm_90",
    "-gencode=arch=compute_90,code=compute_90",
]
HOST_FLAGS = ["-O3", "-g0", "-std=c++17", "-fvisibility=hidden"]


def cpu_sources() -> list[str]:
    """The C++ sources of the CPU ops, relative to the repository."""
    return _sources("csrc/cpu/*.cpp")


def cuda_sources() -> list[str]:
    """The CUDA sources, relative to the repository."""
    return _sources("csrc/cuda/*.cu")


def host_sources() -> list[str]:
    """The sources of `mixkd_fast._host`, which knows pybind11 but not torch, relative to the repository."""
    return _sources("csrc/host/*.cpp")


def include_dirs() -> list[str]:
    """csrc and torch's headers; torch itself is not imported."""
    found = importlib.util.find_spec("torch")
    if found is None or found.origin is None:
        raise RuntimeError("the extensions are compiled against the installed torch, and none is installed")
    torch_include = Path(found.origin).parent / "include"
    return [str(ROOT / "csrc"), str(torch_include), str(torch_include / "torch" / "csrc" / "api" / "include")]


def torch_library_dir() -> str:
    """Where libtorch lies."""
    return str(Path(include_dirs()[1]).parent / "lib")


def _sources(pattern: str) -> list[str]:
    return sorted(str(path.relative_to(ROOT)) for path in ROOT.glob(pattern))
