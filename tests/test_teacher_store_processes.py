"""The teacher's logits on disk under several processes: writers at once, killed writers, ranks of two machines."""

import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from test_teacher_store import expected, opened, readable
from toy import environment

FORK = multiprocessing.get_context("fork")


def write_batches(
    folder: Path, num_rows: int, num_classes: int, salt: int, seed: int, begin: Callable[[], object]
) -> None:
    """What a run does, in a child process: rows in its own order, a batch at a time."""
    store = opened(folder, num_rows, num_classes)
    begin()
    for batch in np.random.default_rng(seed).permutation(num_rows).reshape(-1, 50):
        store.write(batch, expected(batch, num_classes, salt))


def test_two_processes_at_once_leave_whole_rows_of_one_or_the_other(tmp_path: Path) -> None:
    num_rows, num_classes = 4000, 400
    rows = np.arange(num_rows)
    both = [expected(rows, num_classes, salt) for salt in (1, 2)]
    for seed in range(4):
        folder, start = tmp_path / str(seed), FORK.Barrier(3)
        arguments = [(folder, num_rows, num_classes, salt, seed, start.wait) for salt in (1, 2)]
        children = [FORK.Process(target=write_batches, args=one) for one in arguments]
        for child in children:
            child.start()
        store = opened(folder, num_rows, num_classes)
        start.wait()
        alive = True
        while alive:  # and once more when both are done
            alive = any(child.is_alive() for child in children)
            for row, values in readable(store, num_rows).items():
                assert (values == both[0][row]).all() or (values == both[1][row]).all()
        for child in children:
            child.join()
        assert [child.exitcode for child in children] == [0, 0]
        store.write(rows, both[0])
        assert store.num_filled == num_rows, "torn rows are mended"


def test_processes_that_open_a_new_entry_at_once_use_the_same_file(tmp_path: Path) -> None:
    start = FORK.Barrier(6)

    def write_own(number: int) -> None:
        start.wait()
        rows = np.arange(number, 600, 6)
        opened(tmp_path, 600).write(rows, expected(rows))

    children = [FORK.Process(target=write_own, args=(number,)) for number in range(6)]
    for child in children:
        child.start()
    for child in children:
        child.join()
    assert opened(tmp_path, 600).num_filled == 600
    assert [path.name for path in tmp_path.iterdir()] == ["key"]


def test_a_killed_writer_leaves_right_or_missing_rows(tmp_path: Path) -> None:
    num_rows, num_classes, rng = 4000, 400, random.Random(0)
    truth = expected(np.arange(num_rows), num_classes)
    unfinished = 0
    for attempt in range(16):
        folder = tmp_path / str(attempt // 2)  # empty at first, then what a killed one left
        receiver, sender = FORK.Pipe(duplex=False)
        begin = partial(sender.send_bytes, b"begun")
        child = FORK.Process(target=write_batches, args=(folder, num_rows, num_classes, 0, attempt, begin))
        child.start()
        receiver.recv_bytes()
        time.sleep(rng.uniform(0, 0.03))
        assert child.pid is not None
        os.kill(child.pid, signal.SIGKILL)
        child.join()
        store = opened(folder, num_rows, num_classes)
        found = readable(store, num_rows)
        unfinished += 0 < len(found) < num_rows
        assert store.num_filled == len(found)
        assert all((values == truth[row]).all() for row, values in found.items())
    assert unfinished, "no kill hit a writer at work"


RANK = """
import sys
from pathlib import Path
import numpy as np
import torch.distributed as dist
from test_teacher_store import expected, ids
from mixkd_fast.teacher_store import TeacherStore

rank, start, folders = int(sys.argv[1]), sys.argv[2], [Path(name) for name in sys.argv[3:]]
dist.init_process_group("gloo", init_method=f"file://{start}", rank=rank, world_size=2)
store = TeacherStore.open(folders[rank], "key", 100, 3, 1 << 20)
if store is not None:
    own = np.arange(30) + 30 * rank
    store.write(own, expected(own, salt=rank))
    both = ids(70 + rank, 80)  # 80 is written by both: each machine keeps its own
    store.write(both, expected(both, salt=rank))
    store.share()
    dist.barrier()
    print("first", store.num_filled)
    either = {rank} if folders[0] != folders[1] else {0, 1}
    for row, salts in ((3, {0}), (33, {1}), (70, {0}), (71, {1}), (80, either)):
        found = store.read(ids(row))
        print("right", row, found is not None and any((found == expected(ids(row), salt=s)).all() for s in salts))
    dist.barrier()
    if rank == 1:
        store.write(ids(90), expected(ids(90)))
    store.share()
    store.share()
    dist.barrier()
    print("second", store.num_filled)
print("done", store is not None)
dist.destroy_process_group()
"""


def two_ranks(tmp_path: Path, *folders: Path) -> list[list[str]]:
    """What two processes print that use these folders."""
    paths = f"{Path(__file__).parent}{os.pathsep}{environment()['PYTHONPATH']}"
    children = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(rank), str(tmp_path / "start"), *map(str, folders)],
            env=environment(PYTHONPATH=paths, LOCAL_RANK="0" if folders[0] != folders[1] else str(rank)),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    outputs = [child.communicate(timeout=120) for child in children]
    assert [child.returncode for child in children] == [0, 0], outputs
    assert all("Traceback" not in error for _, error in outputs)
    return [output.splitlines() for output, _ in outputs]


@pytest.mark.parametrize("machines", [("one", "two"), ("one", "one")])
def test_ranks_of_one_and_of_two_machines_share_what_they_write(tmp_path: Path, machines: tuple[str, str]) -> None:
    right = [f"right {row} True" for row in (3, 33, 70, 71, 80)]
    for output in two_ranks(tmp_path, *(tmp_path / machine for machine in machines)):
        assert output == ["first 63", *right, "second 64", "done True"]


def test_a_rank_that_cannot_write_leaves_all_without_a_store(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for output in two_ranks(tmp_path, tmp_path / "one", tmp_path / "file" / "two"):
        assert output == ["done False"]
