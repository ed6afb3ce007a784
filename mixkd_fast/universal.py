"""A checkpoint of another number of ranks, in DeepSpeed's universal layout: one whole tensor per parameter and moment.

checkpoints/step-00000120/universal/manifest.json   size and sha256 of every file below
checkpoints/step-00000120/universal/engine/...      what `deepspeed.checkpoint.ds_to_universal` made of state/engine

It goes when its checkpoint goes. A conversion that was killed starts again.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from mixkd_fast import distributed
from mixkd_fast.checkpoint import remove_tree, sync, verify_manifest, write_manifest
from mixkd_fast.errors import CheckpointError

_FOLDER = "universal"
_ASIDE = f".writing-{_FOLDER}"
_MARGIN_BYTES = 64 * 2**20
_WORTH_PROCESSES_BYTES = 2**30


def saved_ranks(state: Path, tag: str) -> int:
    """Number of ranks whose optimizer state lies in a checkpoint's state folder; 0 if it is not cut by rank."""
    return len(list((state / tag).glob("*_optim_states.pt")))


def model_state_files(folder: Path) -> list[Path]:
    """The ranks' files of model states in a folder of DeepSpeed's files, in the order of the ranks."""

    def numbers(path: Path) -> list[int]:
        return [int(number) for number in re.findall(r"\d+", path.name)]

    return sorted(folder.glob("*_model_states.pt"), key=numbers)


def universal_state(checkpoint: Path, tag: str) -> Path:
    """The folder that holds the checkpoint's state in the universal layout; rank 0 makes it if needed. Collective.

    Args: checkpoint = folder of the step; tag = folder of DeepSpeed's files in its state folder.
    Raises: CheckpointError when there is no room, or DeepSpeed cannot convert it.
    """
    error: OSError | CheckpointError | None = None
    if distributed.rank() == 0:
        try:
            _convert_once(checkpoint, tag)
        except (OSError, CheckpointError) as caught:
            error = caught
    message = distributed.first_error(error)
    if message is not None:
        raise CheckpointError(
            f"{checkpoint} cannot be converted for another number of ranks ({message.partition(': ')[2]}). "
            "The checkpoint is intact: mend that, or resume on as many ranks as wrote it."
        ) from error
    return checkpoint / _FOLDER


def _convert_once(checkpoint: Path, tag: str) -> None:
    final, aside = checkpoint / _FOLDER, checkpoint / _ASIDE
    if final.exists():
        try:
            verify_manifest(final)
            return
        except CheckpointError as error:
            distributed.say(f"Converting {checkpoint.name} again: {error}")
            remove_tree(final)
    remove_tree(aside)
    source = checkpoint / "state" / tag
    if (source / "offloaded_tensors").exists():
        raise CheckpointError("DeepSpeed does not convert optimizer states that rest on NVMe")
    size = _require_space(source, checkpoint)
    distributed.say(f"Converting {checkpoint.name} for another number of ranks")
    aside.mkdir()
    try:
        _run_converter(source, aside / tag, size)
        write_manifest(aside, {})
        os.replace(aside, final)
        sync(checkpoint)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise


def _require_space(source: Path, target: Path) -> int:
    """Bytes of the optimizer states; they lie on disk twice more for a while, beside another copy of the rest."""
    optimizer = sum(path.stat().st_size for path in source.glob("*_optim_states.pt"))
    rest = sum(path.stat().st_size for path in source.glob("*_model_states.pt"))
    needed, free = 2 * optimizer + rest + _MARGIN_BYTES, shutil.disk_usage(target).free
    if free < needed:
        raise CheckpointError(f"it takes {needed / 2**20:,.0f} MiB on that disk, and {free / 2**20:,.0f} MiB are free")
    return optimizer


def _run_converter(source: Path, target: Path, size: int) -> None:
    """DeepSpeed's own program in a process of its own: its memory and its output are not this run's."""
    extract, merge = (4, 2) if size > _WORTH_PROCESSES_BYTES else (1, 1)
    command = [
        *(sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--inject_missing_state"),
        *("--input_folder", str(source), "--output_folder", str(target)),
        *("--num_extract_workers", str(extract), "--num_merge_workers", str(merge)),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        raise CheckpointError(f"DeepSpeed's converter: {lines[-1]}")
