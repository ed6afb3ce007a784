"""Builds the extensions; everything else about the package stands in pyproject.toml.

MIXKD_BUILD=auto|cpu|cuda|none (default auto) says which compiled ops to build:
  auto  the CPU library where a C++ compiler and torch are, the CUDA library where nvcc and a CUDA build of torch are;
        what fails is left out, and the package works without it
  cpu   the CPU library alone; a failure ends the installation
  cuda  both; a failure ends the installation
  none  nothing; the losses run in eager PyTorch, and in Triton where that is installed
What was built and why the rest was not is printed, and kept beside the package for `python -m mixkd_fast.ops.backends`.
"""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CCompilerError, ExecError, PlatformError

sys.path.insert(0, str(Path(__file__).resolve().parent))
import build_flags

MODES = ("auto", "cpu", "cuda", "none")
MODE = os.environ.get("MIXKD_BUILD", "auto")
if MODE not in MODES:
    raise SystemExit(f"MIXKD_BUILD is {MODE!r}; allowed: {', '.join(MODES)}")
KINDS = {"_cpu": "cpu", "_cuda": "cuda", "_host": "host"}
DEMANDED = {"auto": (), "cpu": ("cpu",), "cuda": ("cpu", "cuda"), "none": ()}[MODE]


def plan() -> tuple[list[Extension], dict[str, str]]:
    """The extensions to build, and {kind: why not} for the others."""
    left_out = {kind: f"MIXKD_BUILD={MODE}" for kind in KINDS.values()}
    if MODE == "none":
        return [], left_out
    if importlib.util.find_spec("torch") is None:
        reason = "torch could not be imported while building; install with --no-build-isolation"
        if DEMANDED:
            raise SystemExit(f"MIXKD_BUILD is {MODE!r}, but {reason}")
        print(f"mixkd_fast: no compiled ops: {reason}", flush=True)
        return [], dict.fromkeys(KINDS.values(), reason)
    extensions = [cpu_extension()]
    del left_out["cpu"]
    if not build_flags.host_sources():
        left_out["host"] = "no sources"
    elif importlib.util.find_spec("pybind11") is None:
        left_out["host"] = "pybind11 could not be imported while building"
    else:
        extensions.append(host_extension())
        del left_out["host"]
    if MODE in ("auto", "cuda"):
        left_out["cuda"] = why_no_cuda()
        if left_out["cuda"] and MODE == "cuda":
            raise SystemExit(f"MIXKD_BUILD is 'cuda', but {left_out['cuda']}")
        if not left_out["cuda"]:
            extensions.append(cuda_extension())
            del left_out["cuda"]
    return extensions, left_out


def why_no_cuda() -> str:
    """What keeps the CUDA sources from being compiled here, or ""."""
    import torch

    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    if nvcc() is None:
        return "no nvcc on PATH or under CUDA_HOME"
    return ""


def nvcc() -> str | None:
    """The CUDA compiler."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if home:
        return shutil.which("nvcc", path=str(Path(home) / "bin"))
    return shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")


def cpu_extension() -> Extension:
    """The ops of csrc/cpu."""
    return Extension(
        "mixkd_fast._cpu",
        build_flags.cpu_sources(),
        depends=headers(),
        extra_compile_args=build_flags.CPU_FLAGS,
        include_dirs=build_flags.include_dirs(),
        library_dirs=[build_flags.torch_library_dir()],
        libraries=["torch", "torch_cpu", "c10"],
        language="c++",
        py_limited_api=True,
    )


def cuda_extension() -> Extension:
    """The ops of csrc/cuda."""
    return Extension(
        "mixkd_fast._cuda",
        build_flags.cuda_sources(),
        depends=headers(),
        extra_compile_args=[*build_flags.NVCC_FLAGS, *build_flags.GENCODE],
        include_dirs=build_flags.include_dirs(),
        library_dirs=[build_flags.torch_library_dir()],
        libraries=["torch", "torch_cpu", "torch_cuda", "c10"],
        py_limited_api=True,
    )


def host_extension() -> Extension:
    """The Python module of csrc/host."""
    import pybind11

    return Extension(
        "mixkd_fast._host",
        build_flags.host_sources(),
        extra_compile_args=build_flags.HOST_FLAGS,
        include_dirs=[pybind11.get_include()],
        language="c++",
    )


def headers() -> list[str]:
    """What a change of must recompile everything."""
    root = Path(__file__).resolve().parent
    return sorted(str(path.relative_to(root)) for path in root.glob("csrc/**/*.*h"))


class BuildExtensions(build_ext):
    """Compiles the files of an extension side by side, .cu with nvcc; keeps a report of what was built and what not."""

    left_out: dict[str, str]

    def run(self) -> None:
        """Build all extensions, then write and print the report."""
        super().run()
        folder = Path(self.get_ext_fullpath("mixkd_fast._cpu")).parent
        folder.mkdir(parents=True, exist_ok=True)
        report = {kind: self.left_out.get(kind, "") for kind in KINDS.values()}
        (folder / "_build.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        for kind, reason in report.items():
            print(f"mixkd_fast: {kind:4} {'not built: ' + reason if reason else 'built'}", flush=True)

    def build_extension(self, ext: Extension) -> None:
        """Compile and link one extension; a failure is an error only where MIXKD_BUILD demands this kind."""
        kind = KINDS[ext.name.rpartition(".")[2]]
        try:
            self.compile_and_link(ext)
        except (CCompilerError, ExecError, PlatformError, OSError, subprocess.CalledProcessError) as error:
            if kind in DEMANDED:
                raise
            self.left_out[kind] = f"its compilation failed: {str(error).splitlines()[0]}"

    def copy_extensions_to_source(self) -> None:
        """What was not built now must not be found from before either."""
        for ext in [ext for ext in self.extensions if KINDS[ext.name.rpartition(".")[2]] in self.left_out]:
            self.extensions.remove(ext)
            Path(self.get_ext_fullpath(ext.name)).unlink(missing_ok=True)
        super().copy_extensions_to_source()

    def compile_and_link(self, ext: Extension) -> None:
        """Objects of files that are older than a source or header are made again."""
        target = Path(self.get_ext_fullpath(ext.name))
        newest = max(Path(name).stat().st_mtime for name in [*ext.sources, *ext.depends, "build_flags.py", __file__])
        if target.exists() and target.stat().st_mtime > newest and not self.force:
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS", 0)) or os.cpu_count() or 1) as pool:
            objects = list(pool.map(lambda source: self.compile(ext, source), ext.sources))
        if ext.name.endswith("_cuda"):
            paths = [f"-L{folder}" for folder in ext.library_dirs]
            names = [f"-l{library}" for library in ext.libraries]
            subprocess.run([str(nvcc()), "-shared", "-o", str(target), *objects, *paths, *names], check=True)
            return
        self.compiler.link_shared_object(
            objects, str(target), libraries=ext.libraries, library_dirs=ext.library_dirs, target_lang="c++"
        )

    def compile(self, ext: Extension, source: str) -> str:
        """One object file."""
        if source.endswith(".cu"):
            target = Path(self.build_temp) / Path(source).with_suffix(".o")
            target.parent.mkdir(parents=True, exist_ok=True)
            includes = [f"-I{folder}" for folder in ext.include_dirs]
            subprocess.run(
                [str(nvcc()), "-c", source, "-o", str(target), *ext.extra_compile_args, *includes], check=True
            )
            return str(target)
        includes = [*ext.include_dirs, *self.include_dirs]
        made: list[str] = self.compiler.compile(
            [source], output_dir=self.build_temp, include_dirs=includes, extra_postargs=ext.extra_compile_args
        )
        return made[0]


extensions, BuildExtensions.left_out = plan()
setup(ext_modules=extensions, cmdclass={"build_ext": BuildExtensions})
