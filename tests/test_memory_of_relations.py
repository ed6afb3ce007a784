"""The CPU kernel of relation_kl never holds the relations whole."""

import os
import subprocess
import sys

import pytest
import torch
from conftest import require
from relation_cases import STUDENT, make_relation
from torch import Tensor
from toy import ROOT

from benchmarks.timing import peak_bytes
from mixkd_fast.losses import relation_kl


@pytest.fixture(autouse=True)
def the_kernel_is_there() -> None:
    require("cpu")


def test_memory_of_torch_stays_below_one_relation() -> None:
    """Loss and gradients of forward and backward, far less than one [O, h, L, L]."""
    arguments = make_relation(torch.float32, rows=4, heads=4, length=512, width=8)
    leaves = [arguments[name] for name in STUDENT]

    def call(backend: str) -> tuple[Tensor, ...]:
        return torch.autograd.grad(relation_kl(**arguments, backend=backend).sum(), leaves)

    relation = 4 * 4 * 512 * 512 * 4
    assert peak_bytes(lambda: call("cpu"), torch.device("cpu")) < relation / 8
    assert peak_bytes(lambda: call("reference"), torch.device("cpu")) > 2 * relation


def test_memory_of_the_process_stays_below_one_relation() -> None:
    """Buffers of the kernel's own too, which torch does not see."""
    program = (
        "import resource, sys; sys.path[:0] = ['tests']\n"
        "import torch\n"
        "from relation_cases import make_relation\n"
        "from mixkd_fast.losses import relation_kl\n"
        "def run(length):\n"
        "    given = make_relation(torch.float32, rows=2, heads=4, length=length, width=8)\n"
        "    relation_kl(**given, backend='cpu').sum().backward()\n"
        "run(8)\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "run(2048)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
    grown_kib, relation_kib = int(done.stdout), 2 * 4 * 2048 * 2048 * 4 // 1024
    assert grown_kib < relation_kib / 8, f"{grown_kib} KiB more; one relation is {relation_kib}"
