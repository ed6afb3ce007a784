"""Create or update .venv: the right torch for this machine, then this package with its extras.

Without an NVIDIA GPU a CPU build of torch is installed, never CUDA packages; with one, the CUDA build. Standard library
only; run by any Python >= 3.10 as `python3 .ci/make_venv.py`. A second run with unchanged requirements returns at once.
"""

import hashlib
import json
import shutil
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
STAMP = VENV / "mixkd_fast_ready"
TORCH = "torch==2.13.0"  # the version this release is tested with; any torch >= 2.11 will do
EXTRAS = "train,dev"
PEERS = ("liger-kernel>=0.6",)  # as in the extra "bench"; on a machine with a GPU
TIMEOUT_S = 1800  # for one command; the longest fetches torch


def main() -> int:
    if sys.version_info < (3, 10):
        print(f"mixkd_fast needs Python >= 3.10; this is {sys.version.split()[0]} ({sys.executable})", file=sys.stderr)
        return 1
    sources = [ROOT / "pyproject.toml", Path(__file__), ROOT / "setup.py", ROOT / "build_flags.py"]
    sources += sorted(path for path in (ROOT / "csrc").rglob("*") if path.is_file())
    wanted = hashlib.sha256(b"".join(path.read_bytes() for path in sources) + sys.version.encode()).hexdigest()
    if STAMP.exists() and STAMP.read_text() == wanted:
        return 0
    if not PYTHON.exists():
        print(f"Creating {VENV}", flush=True)
        venv.create(VENV, with_pip=True)
    # numpy too: the build imports torch, which warns without it.
    pip("install", "--upgrade", "pip", "setuptools>=77", "wheel", "pybind11>=2.13", "numpy")
    install_torch()
    # No build isolation: the packages below are built against the torch that is here, and no second one is fetched.
    pip("install", "--no-build-isolation", "--editable", f"{ROOT}[{EXTRAS}]")
    if has_nvidia_gpu():
        # What the benchmarks compare with; where it cannot be had, their reports say so.
        why = attempt(pip_command("install", *PEERS))
        if why:
            print(f"left out: {why}", flush=True)
    run([PYTHON, "-m", "mixkd_fast.ops.backends"])
    warm_up()
    STAMP.write_text(wanted)
    return 0


def install_torch() -> None:
    """Install torch if the environment has none."""
    if subprocess.run([PYTHON, "-c", "import torch"], capture_output=True).returncode == 0:
        return
    if sys.platform == "darwin" or has_nvidia_gpu() or offers_cpu_build():
        pip("install", TORCH)
        return
    pip("install", "uv")  # it knows where the CPU builds of torch are kept
    run([VENV / "bin" / "uv", "pip", "install", "--python", PYTHON, "--torch-backend=cpu", TORCH])


def has_nvidia_gpu() -> bool:
    """Whether the driver lists a GPU."""
    tool = shutil.which("nvidia-smi")
    return tool is not None and b"GPU" in subprocess.run([tool, "-L"], capture_output=True).stdout


def offers_cpu_build() -> bool:
    """Whether pip, as it is set up here, would take a CPU build of torch by itself."""
    command = [PYTHON, "-m", "pip", "install", "--dry-run", "--no-deps", "--quiet", "--report", "-", TORCH]
    answer = subprocess.run(command, capture_output=True, text=True)
    if answer.returncode != 0:
        return False
    return json.loads(answer.stdout)["install"][0]["metadata"]["version"].endswith("+cpu")


def warm_up() -> None:
    """Let DeepSpeed compile its CPU communication once now, and fail here if it cannot run."""
    code = "import torch; from mixkd_fast.engine import start_distributed; start_distributed(torch.device('cpu'))"
    run([PYTHON, "-c", code])


def pip(*arguments: str) -> None:
    run(pip_command(*arguments))


def pip_command(*arguments: str) -> list:
    return [PYTHON, "-m", "pip", "--disable-pip-version-check", *arguments, "--quiet"]


def run(command: list) -> None:
    why = attempt(command)
    if why:
        sys.exit(f"set-up failed: {why}")


def attempt(command: list) -> str:
    """Run a command. Returns what went wrong, or ""."""
    shown = " ".join(str(part) for part in command)
    print("+", shown, flush=True)
    try:
        result = subprocess.run(command, cwd=ROOT, timeout=TIMEOUT_S)
    except subprocess.TimeoutExpired:
        return f"{shown} did not end within {TIMEOUT_S} s"
    return f"{shown} ended with {result.returncode}" if result.returncode else ""


if __name__ == "__main__":
    sys.exit(main())
