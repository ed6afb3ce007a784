"""The teacher's logits on disk: what can be read is what was first written; torn or altered rows are missing."""

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from mixkd_fast.teacher_store import TeacherStore

BIG = 1 << 30


def opened(folder: Path, num_rows: int = 100, num_classes: int = 3, key: str = "key") -> TeacherStore:
    store = TeacherStore.open(folder, key, num_rows, num_classes, BIG)
    assert store is not None
    return store


def expected(row_ids: NDArray[np.int64], num_classes: int = 3, salt: int = 0) -> NDArray[np.float32]:
    """Logits that tell row, class and who wrote them."""
    values = np.sin(row_ids[:, None] * 7.0 + np.arange(num_classes) + 1000.0 * salt)
    return values.astype(np.float32)


def ids(*numbers: int) -> NDArray[np.int64]:
    return np.array(numbers, dtype=np.int64)


def readable(store: TeacherStore, num_rows: int) -> dict[int, NDArray[np.float32]]:
    """Every row that can be read by itself."""
    rows = {row: store.read(ids(row)) for row in range(num_rows)}
    return {row: values[0] for row, values in rows.items() if values is not None}


def test_rows_are_missing_until_written_and_then_the_same_bits(tmp_path: Path) -> None:
    store = opened(tmp_path)
    logits = np.array([[-0.0, 1e-42, 3e38], [0.0, 0.0, 0.0], [1.5, -2.5, 0.1]], dtype=np.float32)
    assert store.read(ids(7)) is None and store.num_filled == 0
    store.write(ids(7, 99, 0), logits)
    found = store.read(ids(0, 7, 99, 7))
    assert found is not None and (found.dtype, found.shape) == (np.float32, (4, 3))
    assert found.tobytes() == logits[[2, 0, 1, 0]].tobytes()
    assert store.read(ids(0, 1)) is None, "one missing row is enough"
    assert store.num_filled == 3
    found[:] = 5  # a copy
    store.close()
    again = opened(tmp_path)
    same = again.read(ids(7, 99, 0))
    assert same is not None and same.tobytes() == logits.tobytes()
    nothing = again.read(ids())
    assert nothing is not None and nothing.shape == (0, 3)


def test_numbers_outside_are_missing_and_ignored(tmp_path: Path) -> None:
    store = opened(tmp_path)
    store.write(ids(-1, 100, 5), expected(ids(1, 2, 5)))
    assert store.read(ids(-1)) is None and store.read(ids(5, 100)) is None
    assert store.num_filled == 1
    store.close()
    store.close()
    assert store.read(ids(5)) is None, "a closed store has no rows"


def test_the_first_value_stays(tmp_path: Path) -> None:
    store = opened(tmp_path)
    store.write(ids(4, 4, 6), np.array([[1, 1, 1], [2, 2, 2], [3, 3, 3]], dtype=np.float32))
    store.write(ids(6, 8, 4), np.full((3, 3), 9, dtype=np.float32))
    found = store.read(ids(4, 6, 8))
    assert found is not None and found[:, 0].tolist() == [1, 3, 9]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_never_kept(tmp_path: Path, bad: float) -> None:
    store = opened(tmp_path)
    logits = expected(ids(1, 2, 3))
    logits[1, 2] = bad
    store.write(ids(1, 2, 3), logits)
    assert readable(store, 100).keys() == {1, 3}


@pytest.mark.parametrize(
    "logits", [np.zeros((2, 4), np.float32), np.zeros((3, 3), np.float32), np.zeros((2, 3))], ids=str
)
def test_logits_of_another_shape_or_dtype_are_refused(tmp_path: Path, logits: NDArray[np.float32]) -> None:
    with pytest.raises(ValueError, match=r"allowed: float32 \[2, 3\]"):
        opened(tmp_path).write(ids(1, 2), logits)


def test_an_altered_byte_costs_its_row_alone_and_is_mended_by_the_next_write(tmp_path: Path) -> None:
    store, rows = opened(tmp_path), np.arange(100)
    store.write(rows, expected(rows))
    file = tmp_path / "key" / "logits.rows"
    whole = file.read_bytes()
    assert len(whole) == 100 * 16
    for place in range(5 * 16, 6 * 16):
        for change in (1, 128, 255):
            with file.open("r+b") as stream:
                stream.seek(place)
                stream.write(bytes([whole[place] ^ change]))
            assert store.read(ids(5)) is None and store.read(ids(4, 6)) is not None
            store.write(rows, expected(rows))
            assert file.read_bytes() == whole


def test_a_row_in_the_place_of_another_is_missing(tmp_path: Path) -> None:
    store, rows = opened(tmp_path), np.arange(100)
    store.write(rows, expected(rows))
    file = tmp_path / "key" / "logits.rows"
    content = file.read_bytes()
    with file.open("r+b") as stream:
        stream.write(content[16:] + content[:16])
    assert store.num_filled == 0


def test_changes_that_cancel_in_weak_sums_are_noticed(tmp_path: Path) -> None:
    """Two signs, two swapped classes, words of two writers."""
    store, row = opened(tmp_path), ids(5)
    first, second = expected(row), expected(row, salt=1)
    store.write(row, first)
    words = np.memmap(tmp_path / "key" / "logits.rows", np.float32, "r+", shape=(100, 4))
    for other in (first * [-1, -1, 1], first[:, [1, 0, 2]], np.where([True, False, False], second, first)):
        words[5, :3] = other
        assert store.read(row) is None
    words[5, :3] = first
    assert store.read(row) is not None


def test_lost_pages_after_a_power_loss_cost_their_rows_alone(tmp_path: Path) -> None:
    num_rows, rng = 4000, np.random.default_rng(0)
    store, rows = opened(tmp_path, num_rows), np.arange(num_rows)
    file = tmp_path / "key" / "logits.rows"
    store.write(rows[::2], expected(rows[::2]))
    older = file.read_bytes()
    store.write(rows, expected(rows))
    for past in (bytes(len(older)), older):
        with file.open("r+b") as stream:
            for page in rng.choice(len(past) // 512, 20, replace=False):  # sectors, which are written whole
                stream.seek(512 * page)
                stream.write(past[512 * page : 512 * page + 512])
        found = readable(store, num_rows)
        assert num_rows - 20 * 33 * 2 <= len(found) < num_rows
        assert all((values == expected(ids(row))).all() for row, values in found.items())


def test_rows_beyond_the_bound_are_not_kept(tmp_path: Path) -> None:
    store = TeacherStore.open(tmp_path, "key", 100, 3, 40 * 16 + 15)
    assert store is not None
    store.write(np.arange(100), expected(np.arange(100)))
    assert store.num_filled == 40 and store.read(ids(39)) is not None
    assert store.read(ids(40)) is None and store.read(ids(0, 99)) is None
    assert (tmp_path / "key" / "logits.rows").stat().st_size == 40 * 16


def test_no_room_for_a_row_is_no_store(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert TeacherStore.open(tmp_path / "new", "key", 100, 3, 15) is None
    assert not (tmp_path / "new").exists() and capsys.readouterr().err == ""
