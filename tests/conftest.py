"""Shared by all tests: this checkout and the helpers beside the tests are importable; no hub is asked."""

import contextlib
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

_HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(_HERE), str(_HERE.parent)]
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# One ninja for this process and those it starts: see mixkd_fast.build_locks.
os.environ["PATH"] = os.path.dirname(sys.executable) + os.pathsep + os.environ.get("PATH", os.defpath)
if not torch.cuda.is_available():
    # Before anything imports triton, whose own functions become interpreted or compiled when it is.
    os.environ["TRITON_INTERPRET"] = "1"

# Hundreds of trainings in one process: what each needed at its peak would add up (see mixkd_fast.host_memory).
os.environ.setdefault("MALLOC_CHECK_", "0")
_SHARED_MEMORY = Path("/dev/shm")
_OLD_S = 600.0


@pytest.fixture(autouse=True, scope="module")
def _remove_shared_memory() -> Iterator[None]:
    """DeepSpeed's ranks on a CPU leave 64 MiB of shared memory each: a whole run of these tests would fill it.

    Only what is old: other tests may be running beside these.
    """
    yield
    for path in _SHARED_MEMORY.glob("deepspeed_allreduce_buffer_*") if _SHARED_MEMORY.is_dir() else ():
        with contextlib.suppress(FileNotFoundError):
            if time.time() - path.stat().st_mtime > _OLD_S:
                path.unlink()


@pytest.fixture(autouse=True, scope="module")
def _remove_patches_of_deepspeed() -> Iterator[None]:
    """DeepSpeed's ZeRO-3 leaves a linear function of its own in torch, which keeps other tensors for the backward."""
    linear = torch.nn.functional.linear
    yield
    torch.nn.functional.linear = linear


@pytest.fixture(params=["reference", "cpu"])
def each_backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Runs a test once per backend of the CPU, which "auto" then takes."""
    from mixkd_fast.ops import backends

    name: str = request.param
    require(name)
    monkeypatch.setattr(backends, "preferred", lambda device: (name,))
    monkeypatch.setattr(backends, "_resolved", {})
    yield name


@pytest.fixture(params=["reference", "cpu", "triton"])
def relation_backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every backend of relation_kl that runs on the CPU, Triton's in its interpreter."""
    from mixkd_fast.ops import backends

    name: str = request.param
    if name == "triton":
        pytest.importorskip("triton", reason="triton is not installed")
        if torch.cuda.is_available():
            pytest.skip("Triton compiles here: tests/test_triton_relation_kl.py runs it on the GPU")
        entry = backends.TABLE["relation_kl", "triton"]
        monkeypatch.setitem(backends.TABLE, ("relation_kl", "triton"), entry._replace(missing=lambda: ""))
        monkeypatch.setattr(backends, "_resolved", {})
    else:
        require(name)
    return name


@pytest.fixture(params=["reference", "cpu"])
def linear_backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Runs a test once per backend of linear_kd_loss that the CPU has, which "auto" then takes."""
    from mixkd_fast.ops import backends

    name: str = request.param
    require(name)
    monkeypatch.setattr(backends, "preferred", lambda device: (name,))
    monkeypatch.setattr(backends, "_resolved", {})
    return name


def interpreted_triton(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make Triton's interpreter a backend of `op` here; skip where Triton compiles."""
    from mixkd_fast.ops import backends

    pytest.importorskip("triton", reason="triton is not installed")
    if torch.cuda.is_available():
        pytest.skip("Triton compiles here: the tests of the GPU's kernels run it")
    monkeypatch.setitem(backends.TABLE, (op, "triton"), backends.TABLE[op, "triton"]._replace(missing=lambda: ""))


def require(name: str) -> None:
    """Skip what needs a backend that is not here; where MIXKD_REQUIRE names it, as CI does, fail instead."""
    from mixkd_fast.ops import backends

    missing = {row.backend: row.reason for row in backends.available("kd_loss") if not row.available}
    if name in missing:
        if name in os.environ.get("MIXKD_REQUIRE", "").split(","):
            pytest.fail(f"backend {name} is required here but missing: {missing[name]}")
        pytest.skip(f"backend {name}: {missing[name]}")
