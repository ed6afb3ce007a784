"""Prefetching: the same items as without, ahead but not too far, errors where they belong, no thread left behind."""

import subprocess
import sys
import threading
import time
import traceback

import pytest
import torch
from test_batching import PADDING, make_rows
from toy import environment

from mixkd_fast.data.batching import GlobalBatches, micro_batches
from mixkd_fast.data.prefetch import Prefetcher, pin_batch
from mixkd_fast.mixing import Mixing


def wait_until(condition: threading.Event) -> None:
    assert condition.wait(10)


@pytest.mark.parametrize("depth", [0, 1, 2, 50])
def test_items_are_those_of_their_steps(depth: int) -> None:
    rows = make_rows(40, soft=True)
    batches = GlobalBatches(40, 8, seed=1, mixing=Mixing(pairing="dataset"))

    def make(step: int) -> list[torch.Tensor]:
        (batch,) = micro_batches(rows, batches.draw(step), 0, 1, 8, PADDING)
        return [value for value in vars(batch).values() if isinstance(value, torch.Tensor)]

    with Prefetcher(make, 3, 20, depth) as prefetcher:
        for step in range(3, 20):
            found, expected = prefetcher.get(step), make(step)
            assert found and all(map(torch.equal, found, expected))


@pytest.mark.parametrize("depth", [1, 2, 5])
def test_exactly_depth_items_are_made_ahead(depth: int) -> None:
    made: list[int] = []
    reached = {step: threading.Event() for step in range(30)}

    def make(step: int) -> int:
        made.append(step)
        reached[step].set()
        return step

    with Prefetcher(make, 0, 30, depth) as prefetcher:
        for step in range(10):
            wait_until(reached[step + depth - 1])
            time.sleep(0.01)
            assert made == list(range(step + depth))
            assert prefetcher.get(step) == step
    assert len(made) <= 10 + depth


def test_depth_0_makes_items_in_the_caller() -> None:
    threads = []
    with Prefetcher(lambda step: threads.append(threading.current_thread()), 0, 3, depth=0) as prefetcher:
        assert threads == []
        prefetcher.get(0)
    assert threads == [threading.main_thread()]


@pytest.mark.parametrize("depth", [0, 2])
def test_steps_out_of_order_are_refused(depth: int) -> None:
    with Prefetcher(str, 5, 7, depth) as prefetcher:
        for wrong in (4, 6, 7):
            with pytest.raises(ValueError, match=f"step is {wrong}; allowed: 5"):
                prefetcher.get(wrong)
        assert prefetcher.get(5) == "5", "a refusal uses nothing up"
        with pytest.raises(ValueError, match="step is 5; allowed: 6"):
            prefetcher.get(5)
        assert prefetcher.get(6) == "6"
        with pytest.raises(ValueError, match="step is 7; allowed: none, all up to 6 have been given"):
            prefetcher.get(7)
    with pytest.raises(ValueError, match="allowed after close: none"):
        prefetcher.get(7)


def test_no_steps_at_all() -> None:
    with Prefetcher(str, 5, 5) as prefetcher, pytest.raises(ValueError, match="step is 5; allowed: none"):
        prefetcher.get(5)


@pytest.mark.parametrize(("arguments", "message"), [((0, 1, -1), "depth is -1"), ((3, 2, 1), "start is 3")])
def test_wrong_arguments_are_refused(arguments: tuple[int, int, int], message: str) -> None:
    with pytest.raises(ValueError, match=f"{message}; allowed: "):
        Prefetcher(str, *arguments)


def fails_at_2(step: int) -> int:
    if step == 2:
        raise OSError("the disk is gone")
    return step


@pytest.mark.parametrize("depth", [0, 1, 4])
def test_an_error_is_raised_by_the_get_of_its_step(depth: int) -> None:
    with Prefetcher(fails_at_2, 0, 10, depth) as prefetcher:
        assert [prefetcher.get(step) for step in (0, 1)] == [0, 1]
        for _ in range(2):  # and again, instead of waiting for ever
            with pytest.raises(OSError, match="the disk is gone") as error:
                prefetcher.get(2)
            assert "fails_at_2" in "".join(traceback.format_tb(error.value.__traceback__))
        with pytest.raises(ValueError, match="allowed: 2"):
            prefetcher.get(3)


def prefetch_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "prefetch"]


def test_close_ends_the_thread_at_once_wherever_it_is() -> None:
    making, release = threading.Event(), threading.Event()

    def make(step: int) -> int:
        if step == 1:
            making.set()
            wait_until(release)
        return step

    waiting_for_room = Prefetcher(str, 0, 100)
    at_work = Prefetcher(make, 0, 100)
    finished = Prefetcher(str, 0, 1)
    failed = Prefetcher(fails_at_2, 2, 5)
    wait_until(making)
    threading.Timer(0.05, release.set).start()
    started = time.perf_counter()
    for prefetcher in (waiting_for_room, at_work, finished, failed):
        prefetcher.close()
        prefetcher.close()
    assert time.perf_counter() - started < 5
    assert prefetch_threads() == []


def test_an_error_in_the_block_closes_too() -> None:
    with pytest.raises(KeyError), Prefetcher(str, 0, 100):
        raise KeyError
    assert prefetch_threads() == []


def test_a_crash_does_not_hang_the_interpreter() -> None:
    code = """
import time
from mixkd_fast.data.prefetch import Prefetcher
prefetcher, stuck = Prefetcher(str, 0, 100), Prefetcher(lambda step: time.sleep(1000), 0, 100)
prefetcher.get(0)
raise RuntimeError("crash")
"""
    done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and done.stderr.rstrip().endswith("RuntimeError: crash")


def test_pinning_keeps_the_batch() -> None:
    draw = GlobalBatches(20, 6, seed=0, mixing=Mixing()).draw(0)
    (batch,) = micro_batches(make_rows(20, soft=True), draw, 0, 1, 6, PADDING)
    pinned = pin_batch(batch)
    if not torch.cuda.is_available():
        assert pinned is batch
        return
    for name, value in vars(batch).items():
        if isinstance(value, torch.Tensor):
            assert vars(pinned)[name].is_pinned() and torch.equal(vars(pinned)[name], value)
    assert pinned.num_rows == batch.num_rows


def test_pinning_takes_every_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is no GPU, with a copy in the place of pinned memory."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor.clone())
    draw = GlobalBatches(20, 6, seed=0).draw(0)
    (batch,) = micro_batches(make_rows(20), draw, 0, 1, 6, PADDING)
    pinned = pin_batch(batch)
    assert pinned.soft_labels is None and pinned.partner is None and pinned.num_rows == 6
    for name, value in vars(batch).items():
        if isinstance(value, torch.Tensor):
            assert vars(pinned)[name] is not value and torch.equal(vars(pinned)[name], value)
