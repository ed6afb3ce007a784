"""The folder of one run on disk: who may start there, its log of metrics, its configuration and summary."""

import json
import math
import os
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from mixkd_fast import distributed
from mixkd_fast.checkpoint import MANIFEST, CheckpointStore, remove_tree, sync
from mixkd_fast.configuration import Config
from mixkd_fast.errors import CheckpointError, ConfigurationError
from mixkd_fast.folder_lock import alone_in
from mixkd_fast.shared_folder import require_shared
from mixkd_fast.strict_json import read_object

_FREE_ON_RESUME = {
    "$schema",
    "output.overwrite",
    "output.report",
    "training.checkpoint_every",
    "training.keep_checkpoints",
    "training.log_every",
    # How a step's rows are dealt out, not which they are; `Run` refuses what would change them.
    "training.micro_batch_size",
    "training.rank_timeout_s",
    "task.cache_dir",
}


class RunFolder:
    """Creates or reopens the folder, and keeps other runs out until it is left. Collective; only rank 0 writes."""

    def __init__(self, config: Config, resume: bool) -> None:
        self._held = ExitStack()
        self.path = Path(config.output.directory)
        self.store = CheckpointStore(self.path / "checkpoints", config.training.keep_checkpoints)
        error: Exception | None = None
        if distributed.rank() == 0:
            try:
                self._open(config, resume)
            except (OSError, ConfigurationError, CheckpointError) as caught:
                error = caught
        message = distributed.first_error(error)
        if message is not None:
            self._held.close()
        if isinstance(error, ConfigurationError | CheckpointError):
            raise error
        # The other ranks know the message alone.
        kind, _, text = (message or "").partition(": ")
        if error is None and kind in ("ConfigurationError", "CheckpointError"):
            raise ConfigurationError(text)
        if message is not None:
            raise ConfigurationError(
                f"output.directory = {config.output.directory!r}: cannot be written ({message}); "
                "choose a folder you own"
            ) from error
        # A checkpoint consists of files of all ranks.
        require_shared(self.path, "output.directory")

    def __enter__(self) -> "RunFolder":
        return self

    def __exit__(self, *_: object) -> None:
        self._held.close()

    def _open(self, config: Config, resume: bool) -> None:
        self._held.enter_context(alone_in(self.path, "output.directory", "run"))
        used = (self.path / "config.json").exists() or self.store.directory.exists()
        if used and not resume:
            if not config.output.overwrite:
                raise ConfigurationError(
                    f"output.directory = {str(self.path)!r} holds an earlier run: "
                    "--resume continues it, --set output.overwrite=true deletes it, or choose another folder"
                )
            for name in ("checkpoints", "best", "student"):
                remove_tree(self.path / name)
            for name in ("config.json", "metrics.jsonl", "summary.json", "report.html"):
                (self.path / name).unlink(missing_ok=True)
        resolved = config.model_dump(mode="json", by_alias=True, serialize_as_any=True)
        if isinstance(config.deepspeed, str):  # what the file says now, so that a resumed run notices a change
            resolved["deepspeed"] = read_object(config.deepspeed, "deepspeed")
        if resume and (self.path / "config.json").exists():
            self._refuse_other_configuration(resolved)
        write_json(self.path / "config.json", resolved)

    def _refuse_other_configuration(self, resolved: dict[str, Any]) -> None:
        try:
            earlier = json.loads((self.path / "config.json").read_text())
        except ValueError as error:
            raise CheckpointError(f"{self.path / 'config.json'} is not readable JSON: {error}") from error
        before, now = flatten(earlier), flatten(resolved)
        changed = [
            f"{key}: {before.get(key)!r} then, {now.get(key)!r} now"
            for key in sorted(before.keys() | now.keys())
            if before.get(key) != now.get(key) and key not in _FREE_ON_RESUME
        ]
        if changed:
            raise ConfigurationError(
                "--resume needs the configuration the run was started with; these fields differ:\n  "
                + "\n  ".join(changed)
                + "\nChange them back, or start a new run in another output.directory"
            )

    def drop_unused_best(self, current: dict[str, Any] | None) -> None:
        """Delete the weights of best evaluations that no checkpoint refers to any more."""
        kept = {None if current is None else current["step"]}
        for manifest in self.store.directory.glob(f"step-*/{MANIFEST}"):
            best = json.loads(manifest.read_text())["state"]["best"]
            kept.add(None if best is None else best["step"])
        for folder in (self.path / "best").glob("step-*"):
            if int(folder.name.removeprefix("step-")) not in kept:
                remove_tree(folder)


class MetricsLog:
    """metrics.jsonl: one JSON object per line, cut back to a checkpoint's length on resume. Rank 0 writes."""

    def __init__(self, path: Path, num_bytes: int) -> None:
        self._file = None
        if distributed.rank() == 0:
            self._file = path.open("ab")
            if path.stat().st_size < num_bytes:
                raise CheckpointError(f"{path} is shorter than when the checkpoint was written: {num_bytes} bytes then")
            self._file.truncate(num_bytes)
            self._file.seek(num_bytes)

    def write(self, record: dict[str, Any]) -> None:
        """Append a record; not-finite numbers become null, as JSON has none."""
        if self._file is not None:
            try:
                self._file.write((json.dumps(finite(record)) + "\n").encode())
                self._file.flush()
            except OSError as error:
                raise CheckpointError(
                    f"output.directory: cannot write {self._file.name} ({error}). "
                    "Checkpoints are intact; free space, then run again with --resume."
                ) from error

    def size(self) -> int:
        """Bytes that are safely on disk."""
        if self._file is None:
            return 0
        os.fsync(self._file.fileno())
        return self._file.tell()

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()


def write_json(path: Path, content: Any) -> None:
    """Write JSON aside and rename it into place."""
    aside = path.with_name(f".writing-{path.name}")
    aside.write_text(json.dumps(finite(content), indent=2) + "\n")
    sync(aside)
    os.replace(aside, path)


def finite(value: Any) -> Any:
    """The value with NaN and infinities as None."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return value


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries as one with dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
