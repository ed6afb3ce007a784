"""The next batches made in a background thread while the device works on this one."""

import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from queue import SimpleQueue
from types import TracebackType
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from mixkd_fast.data.batching import Batch

T = TypeVar("T")
_PATIENCE_S = 10.0


class Prefetcher(Generic[T]):
    """Makes the items of steps start, ..., stop - 1 by `make(step)`, in turn, up to `depth` ahead of their use.

    `make` runs in one background thread (for depth 0 in the caller's) and must depend on its step alone: then
    prefetching changes nothing but the time.
    """

    def __init__(self, make: Callable[[int], T], start: int, stop: int, depth: int = 2) -> None:
        if depth < 0:
            raise ValueError(f"depth is {depth}; allowed: at least 0")
        if start > stop:
            raise ValueError(f"start is {start}; allowed: up to stop, which is {stop}")
        self._make = make
        self._next, self._stop = start, stop
        self._items: SimpleQueue[Future[T]] = SimpleQueue()
        self._current: Future[T] | None = None
        self._room = threading.Semaphore(depth)
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None
        if depth > 0:
            # Threads start on GPU 0, where pinned memory would cost a context of every rank.
            device = torch.cuda.current_device() if torch.cuda.is_initialized() else None
            # A daemon: one that nobody has closed must not hold back the end of the program.
            self._thread = threading.Thread(target=self._work, args=(start, device), name="prefetch", daemon=True)
            self._thread.start()

    def get(self, step: int) -> T:
        """The item of the step after the last one that was given.

        Raises: what `make(step)` raised, with its traceback; ValueError for another step, or after `close`.
        """
        if self._closed.is_set():
            raise ValueError(f"step is {step}; allowed after close: none")
        if step != self._next or step >= self._stop:
            allowed = self._next if self._next < self._stop else f"none, all up to {self._stop - 1} have been given"
            raise ValueError(f"step is {step}; allowed: {allowed}")
        if self._thread is None:
            item = self._make(step)
        else:
            if self._current is None:
                self._current = self._items.get()
            item = self._current.result()  # raises; the step stays the next one, and raises again
            self._current = None
            self._room.release()
        self._next += 1
        return item

    def close(self) -> None:
        """End the thread; only an item that is being made is waited for, and not for ever."""
        self._closed.set()
        self._room.release()
        if self._thread is not None:
            self._thread.join(_PATIENCE_S)

    def __enter__(self) -> "Prefetcher[T]":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _work(self, start: int, device: int | None) -> None:
        if device is not None:
            torch.cuda.set_device(device)
        for step in range(start, self._stop):
            self._room.acquire()
            if self._closed.is_set() or not self._put(step):
                return

    def _put(self, step: int) -> bool:
        """Make one item, or keep what was raised for whoever asks; returns whether it was made."""
        future: Future[T] = Future()
        try:
            future.set_result(self._make(step))
        except BaseException as error:
            future.set_exception(error)
        self._items.put(future)
        return future.exception() is None


def pin_batch(batch: Batch) -> Batch:
    """The batch in pinned memory, from which `Batch.to(device, non_blocking=True)` copies while the GPU computes.

    Without CUDA the batch itself.
    """
    if not torch.cuda.is_available():
        return batch
    tensors: dict[str, Any] = {name: value for name, value in vars(batch).items() if isinstance(value, Tensor)}
    return replace(batch, **{name: tensor.pin_memory() for name, tensor in tensors.items()})
