"""Runs of a script in processes that are forked from one that has imported everything.

A short run is mostly imports (torch, transformers, datasets, DeepSpeed: about eight seconds of a core). A forked
process is as fresh in every other respect: its own arguments, environment, output and exit status. Tests of launchers,
signals and of what imports read from the environment start real processes instead.
"""

import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MODULES = [
    "mixkd_fast.cli",
    "mixkd_fast.distillation",
    "mixkd_fast.report",
    "deepspeed.runtime.engine",
    "deepspeed.runtime.zero.stage3",
    "matplotlib.pyplot",
    "transformers.models.bert.modeling_bert",
    "transformers.models.llama.modeling_llama",
]
_POLL_S = 0.02


def run_script(
    arguments: list[str], environments: list[dict[str, str]], timeout: float
) -> subprocess.CompletedProcess[str]:
    """Run `python arguments...` in the checkout, once for every environment, side by side.

    Returns: the first exit status that is not 0, and what all printed. When one fails, the others are killed.
    Raises: subprocess.TimeoutExpired, after killing all.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(MODULES)
    with tempfile.TemporaryDirectory() as folder:
        outputs = [(Path(folder) / f"{n}.out", Path(folder) / f"{n}.err") for n in range(len(environments))]
        processes = [
            context.Process(target=_run, args=(arguments, environment, *map(str, output)))
            for environment, output in zip(environments, outputs, strict=True)
        ]
        with ExitStack() as stack:
            for process in processes:
                process.start()
                stack.callback(process.close)
                stack.callback(process.join)
                stack.callback(process.kill)
            deadline = time.monotonic() + timeout
            while any(process.exitcode is None for process in processes):
                if any(process.exitcode for process in processes):
                    break
                if time.monotonic() > deadline:
                    raise subprocess.TimeoutExpired(arguments, timeout, outputs[0][0].read_text())
                time.sleep(_POLL_S)
            status = next((process.exitcode for process in processes if process.exitcode), 0)
        texts = ["".join(path.read_text() for path in paths) for paths in zip(*outputs, strict=True)]
    return subprocess.CompletedProcess(arguments, status, *texts)


def _run(arguments: list[str], environment: dict[str, str], output: str, errors: str) -> None:
    """Be that process."""
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(ROOT)
    for path, descriptor in ((output, 1), (errors, 2)):
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, descriptor)
        os.close(file)
    sys.path.insert(0, str(ROOT))
    if arguments[0] == "-m":
        sys.argv = arguments[1:]
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = list(arguments)
        sys.path.insert(0, str((ROOT / arguments[0]).parent))
        runpy.run_path(arguments[0], run_name="__main__")
