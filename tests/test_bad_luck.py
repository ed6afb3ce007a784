"""Full disks, unwritable folders, missing memory, missing networks: a clear error, and nothing lost."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from toy import losses, must_run, program, run, save_toy_teacher, toy_config, toy_tokenizer
from transformers import BertConfig

from mixkd_fast.folder_lock import alone_in

# Writes of one process to one file end after so many bytes, as on a full disk: an error of the operating system.
_LIMITED = (
    "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, ({0}, {0})); "
    "from mixkd_fast.train import main; sys.exit(main(sys.argv[1:]))"
)


def _write(folder: Path, config: dict[str, Any]) -> str:
    path = folder / "config.json"
    path.write_text(json.dumps(config))
    return str(path)


def test_full_disk_keeps_the_last_good_checkpoint(tmp_path: Path) -> None:
    training = {"steps": 18, "evaluate_every": 6}
    whole = _write(tmp_path, toy_config(tmp_path, "whole", training=training))
    must_run(program("--config", whole))
    expected = losses(tmp_path / "whole")

    cut = _write(tmp_path, toy_config(tmp_path, "run", training=training))
    must_run(program("--config", cut))
    checkpoints = tmp_path / "run" / "checkpoints"
    # Go back to the first checkpoint, as after a kill, and let the disk be full from there on.
    for path in sorted(checkpoints.glob("step-*"))[1:]:
        for file in path.rglob("*.pt"):
            file.unlink()
    limit = 40_000
    limited = tmp_path / "limited.py"
    limited.write_text(_LIMITED.format(limit))
    result = run([sys.executable, str(limited), "--config", cut, "--resume"])
    assert result.returncode == 1, result.stderr
    assert "output.directory: cannot write" in result.stderr and "--resume" in result.stderr
    assert "Traceback" not in result.stderr
    assert not list(checkpoints.glob(".writing-*"))
    output = must_run(program("--config", cut, "--resume"))
    assert "Resuming from" in output and "after step 12 of 18" in output
    assert losses(tmp_path / "run") == expected


def test_unwritable_folder_is_refused_at_the_start(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    path = _write(tmp_path, toy_config(tmp_path, "file/run"))
    result = run(program("--config", path))
    assert result.returncode == 1
    assert "output.directory = " in result.stderr and "cannot be written" in result.stderr


@pytest.mark.parametrize(("field", "section"), [("teacher.model", "teacher"), ("student.model", "student")])
def test_hub_name_without_network_says_what_to_put_locally(tmp_path: Path, field: str, section: str) -> None:
    config = toy_config(
        tmp_path,
        **{
            section: {"model": "some-user/some-model", "num_layers": None}
            if section == "student"
            else {"model": "some-user/some-model"}
        },
    )
    result = run(program("--config", _write(tmp_path, config)))
    assert result.returncode == 1
    assert field in result.stderr and "some-user/some-model" in result.stderr
    assert "model.safetensors" in result.stderr and "tokenizer.json" in result.stderr


def test_hub_data_without_network_says_what_to_put_locally(tmp_path: Path) -> None:
    config = toy_config(tmp_path)
    config["task"] = {"name": "mnli", "max_length": 32}
    result = run(program("--config", _write(tmp_path, config)))
    assert result.returncode == 1
    assert "nyu-mll/glue" in result.stderr and "task.train_files" in result.stderr and "premise" in result.stderr


def test_teacher_with_another_tokenizer_is_refused(tmp_path: Path) -> None:
    config = toy_config(tmp_path)
    other = save_toy_teacher(tmp_path / "other")
    tokenizer = toy_tokenizer()
    tokenizer.add_tokens(["surplus"])
    tokenizer.save_pretrained(other)
    config["student"] = {"model": str(other)}
    result = run(program("--config", _write(tmp_path, config)))
    assert result.returncode == 1
    assert "tokenizers differ" in result.stderr and "surplus" in result.stderr


def test_teacher_with_another_number_of_labels_is_refused(tmp_path: Path) -> None:
    config = toy_config(tmp_path)
    save_toy_teacher(tmp_path / "five", num_labels=5)
    config["teacher"] = {"model": str(tmp_path / "five")}
    result = run(program("--config", _write(tmp_path, config)))
    assert result.returncode == 1
    assert "the teacher gives 5 logits" in result.stderr and "2 labels" in result.stderr


def test_sequences_longer_than_the_positions_are_refused(tmp_path: Path) -> None:
    config = toy_config(tmp_path, task={**toy_config(tmp_path)["task"], "max_length": 33})
    result = run(program("--config", _write(tmp_path, config)))
    assert result.returncode == 1
    assert "task.max_length is 33" in result.stderr and "32" in result.stderr


def test_batch_that_does_not_divide_is_refused_with_the_nearest(tmp_path: Path) -> None:
    config = toy_config(tmp_path, training={"batch_size": 10, "micro_batch_size": 4})
    result = run(program("--config", _write(tmp_path, config)))
    assert result.returncode == 1
    assert "training.batch_size = 10" in result.stderr and "nearest: 8 or 12" in result.stderr


def test_zero3_without_memory_for_one_layer_is_refused(tmp_path: Path) -> None:
    config = toy_config(tmp_path, teacher={"model": str(tmp_path / "huge"), "zero_stage": 3})
    folder = save_toy_teacher(tmp_path / "huge")
    huge = BertConfig.from_pretrained(folder)
    huge.vocab_size = 50_000_000_000  # 6 TB of word embeddings in one piece
    huge.save_pretrained(folder)
    result = run(program("--config", _write(tmp_path, config)))
    assert result.returncode == 1
    assert "teacher.zero_stage = 3: the largest layer has 1,600,000,000,000 parameters" in result.stderr
    assert "GiB are free" in result.stderr and "Traceback" not in result.stderr


def test_fp16_on_a_cpu_is_refused(tmp_path: Path) -> None:
    result = run(program("--config", _write(tmp_path, toy_config(tmp_path, training={"precision": "fp16"}))))
    assert result.returncode == 1 and 'training.precision = "fp16" needs a GPU' in result.stderr


def test_two_runs_do_not_share_a_folder(tmp_path: Path) -> None:
    path = _write(tmp_path, toy_config(tmp_path))
    with alone_in(tmp_path / "run", "output.directory", "run"):
        for more in ([], ["--resume"], ["--set", "output.overwrite=true"]):
            result = run(program("--config", path, *more))
            assert result.returncode == 1
            assert "output.directory = " in result.stderr and "another run is at work there" in result.stderr
    assert [file.name for file in (tmp_path / "run").iterdir()] == [".run.lock"]
    must_run(program("--config", path))
