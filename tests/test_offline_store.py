"""The offline teacher store: it equals the live teacher, survives kills and damage, and fits or is refused."""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from toy import ROOT, environment, losses, must_run, must_run_ranks, records, run_ranks
from toy import run as run_command
from toy_lm import byte_tokenizer, language_config, run, save_lm, sentences, tiny_lm, write_lines

from mixkd_fast.cli import main
from mixkd_fast.configuration import Config, validate
from mixkd_fast.errors import ConfigurationError, DataError, MixKDError
from mixkd_fast.offline.manifest import MANIFEST, WRITING, Origin
from mixkd_fast.offline.reading import OfflineStore
from mixkd_fast.offline.records import MOST_TARGETS, shard_cuts
from mixkd_fast.offline.writing import StoreWriter
from mixkd_fast.teaching import Taught, TeachOptions, teach

VOCABULARY = 258
TEACH = "mixkd_fast/cli_teach.py"


def taught(config: dict[str, Any], folder: Path, kind: Any, **options: Any) -> Taught:
    fields = {"shard_mib": 0.05, **options}
    return teach(validate(Config, config), TeachOptions(kind, folder, **fields), progress=False)


def config_in(folder: Path, **sections: Any) -> dict[str, Any]:
    """A student of its own, so that nothing but the store speaks for the teacher."""
    config = language_config(folder, **sections)
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    config["student"] = {
        "config": {"model_type": "llama", **shape, "max_position_embeddings": 64},
        "tokenizer": str(folder / "teacher"),
    }
    return config


def offline(config: dict[str, Any], store: Path, output: str, **teacher: Any) -> dict[str, Any]:
    folder = Path(config["output"]["directory"]).with_name(output)
    return config | {
        "teacher": {"offline": str(store), **teacher},
        "output": {"directory": str(folder), "report": False},
    }


def files_of(store: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(store.iterdir())}


@pytest.mark.parametrize(
    ("instruct", "temperature", "options"),
    [
        (True, 2.0, {"kind": "top_k", "k": VOCABULARY, "dtype": "fp32"}),
        (False, 1.0, {"kind": "hidden", "dtype": "fp32"}),
        (True, 1.0, {"kind": "hidden", "dtype": "fp32"}),
    ],
)
def test_a_store_that_keeps_all_trains_as_the_live_teacher(
    tmp_path: Path, instruct: bool, temperature: float, options: dict[str, Any]
) -> None:
    method = {"name": "lm_kd", "kd_weight": 0.7, "temperature": temperature}
    config = config_in(tmp_path, instruct=instruct, method=method)
    run(config)
    live = losses(tmp_path / "run")
    given = dict(options)
    written = taught(config, tmp_path / "store", given.pop("kind"), temperature=temperature, **given)
    assert written.store.origin.num_shards > 1 and written.num_written == written.store.origin.num_tokens
    result = run(offline(config, tmp_path / "store", "stored"))
    stored = losses(tmp_path / "stored")
    assert max(live) - min(live) > 0.1 and stored == pytest.approx(live, rel=2e-5)
    assert records(tmp_path / "stored", "evaluation")[-1]["metrics"] == pytest.approx(
        records(tmp_path / "run", "evaluation")[-1]["metrics"], rel=1e-3
    )
    about = result.summary["teacher"]
    assert about["metrics"] == {} and about["offline"]["kind"] == options["kind"]
    # Beside the model: the same answers from the store, and the teacher is evaluated.
    model = str(tmp_path / "teacher")
    beside = run(offline(config, tmp_path / "store", "beside", model=model))
    assert losses(tmp_path / "beside") == stored and beside.summary["teacher"]["metrics"]["validation"]


def test_top_k_in_half_precision_is_the_teachers(tmp_path: Path) -> None:
    """Against an independent forward: classes, log-probabilities, and the mass of the others after rounding."""
    config = config_in(tmp_path, instruct=True)
    store = taught(config, tmp_path / "store", "top_k", k=5, temperature=1.7).store
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "teacher").eval().double()
    tokenizer = byte_tokenizer()
    first = json.loads(Path(config["task"]["train_files"][0]).read_text().splitlines()[0])
    prompt = tokenizer(f"Q: {first['instruction']} {first['input']}\nA: ").input_ids
    ids = prompt + tokenizer(first["output"]).input_ids + [tokenizer.eos_token_id]
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids])).logits[0, len(prompt) - 1 : -1]
    expected = (logits / 1.7).log_softmax(-1).topk(5)
    found = store.rows(np.array([0]))
    assert found["indices"].dtype == torch.int32 and found["logprobs"].dtype == torch.float16
    assert torch.equal(found["indices"].long(), expected.indices)
    torch.testing.assert_close(found["logprobs"].double(), expected.values, atol=2e-3, rtol=1e-3)
    torch.testing.assert_close(found["log_mass"].double(), expected.values.logsumexp(-1), atol=1e-5, rtol=1e-5)
    facts = store.facts()
    assert facts["bytes_per_token"] >= 5 * 6 + 4 and store.record_bytes == sum(
        path.stat().st_size for path in store.folder.glob("shard-*")
    )


def test_a_resumed_store_is_the_uninterrupted_one(tmp_path: Path) -> None:
    """kill -9 while it is written: finished shards stay as they are, the rest is made, the bytes are the same."""
    config = config_in(tmp_path)
    config["task"]["train_files"] = [write_lines(tmp_path / "long.jsonl", [{"text": t} for t in sentences(1500)])]
    (tmp_path / "config.json").write_text(json.dumps(config))
    options = [
        "--kind",
        "hidden",
        "--dtype",
        "fp32",
        "--shard-mib",
        "0.06",
        "--set",
        "training.evaluation_batch_size=4",
    ]
    command = [sys.executable, "-m", "mixkd_fast.cli", "teach", "--config", str(tmp_path / "config.json"), *options]
    killed = tmp_path / "killed"
    with subprocess.Popen([*command, "--output", str(killed)], cwd=ROOT, env=environment()) as process:
        deadline = time.monotonic() + 120
        while len(list(killed.glob("shard-*.json"))) < 3 and time.monotonic() < deadline:
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
    done = {path.name: path.stat().st_ino for path in killed.glob("shard-*.safetensors")}
    assert len(done) >= 3 and (killed / WRITING).exists() and not (killed / MANIFEST).exists()
    with pytest.raises(DataError, match="is not finished"):
        OfflineStore(killed, "teacher.offline")
    said = must_run([*command, "--output", str(killed)])
    must_run([*command, "--output", str(tmp_path / "whole")])
    assert files_of(killed) == files_of(tmp_path / "whole")
    kept = [name for name, inode in done.items() if (killed / name).stat().st_ino == inode]
    assert len(kept) >= len(done) - 1 and "bytes a token" in said
    assert main(["store", str(killed), "--verify"]) == 0


def teach_command(config: dict[str, Any], folder: Path, *options: str) -> list[str]:
    """The arguments of `mixkd-fast teach` for a configuration, small top_k shards."""
    (folder / "config.json").write_text(json.dumps(config))
    return ["--config", str(folder / "config.json"), "--kind", "top_k", "--k", "4", "--shard-mib", "0.0035", *options]


def test_two_ranks_write_the_same_store(tmp_path: Path) -> None:
    """Shards of several batches, unequally many, and one rank without a shard at the end."""
    config = config_in(tmp_path, instruct=True, training={"evaluation_batch_size": 2})
    one = taught(config, tmp_path / "one", "top_k", k=4, shard_mib=0.0035).store
    assert one.origin.num_shards % 2 == 1 and one.origin.num_shards > 3
    sizes = np.diff(one.origin.shard_rows)
    assert (-(-sizes // 2)).max() > (-(-sizes // 2)).min() and sizes.max() > 4
    command = teach_command(config, tmp_path)
    must_run_ranks(2, *command, "--output", str(tmp_path / "two"), script=TEACH)
    assert files_of(tmp_path / "one") == files_of(tmp_path / "two")
    parted = ["--output", str(tmp_path / "parts"), "--set", "teacher.zero_stage=3"]
    must_run_ranks(2, *command, *parted, script=TEACH, timeout=100)
    parts = OfflineStore(tmp_path / "parts", "x")
    everything = np.arange(one.origin.num_rows)
    for name, values in one.rows(everything).items():
        torch.testing.assert_close(parts.rows(everything)[name], values)


def test_a_row_that_one_rank_cannot_keep_ends_all_of_them(tmp_path: Path) -> None:
    """Of a partitioned teacher the others are in the middle of their forwards then."""
    config = config_in(tmp_path, training={"evaluation_batch_size": 2}, teacher={"zero_stage": 3})
    texts = sentences(64)
    texts[0] = "\x07" + texts[0]
    config["task"]["train_files"] = [write_lines(tmp_path / "bell.jsonl", [{"text": text} for text in texts])]
    model = tiny_lm(seed=3)
    with torch.no_grad():
        model.get_input_embeddings().weight[byte_tokenizer()("\x07").input_ids[0]] = float("nan")
    model.save_pretrained(tmp_path / "teacher")
    command = teach_command(config, tmp_path, "--output", str(tmp_path / "store"))
    failed = run_ranks(2, *command, script=TEACH, timeout=100)
    assert failed.returncode == 1 and "gives log_mass that are not finite" in failed.stderr, failed.stderr
    assert "free space" not in failed.stderr and "Traceback" not in failed.stderr


def test_an_output_that_ranks_do_not_share_is_refused(tmp_path: Path) -> None:
    command = teach_command(config_in(tmp_path), tmp_path, "--output", "store")
    failed = run_ranks(2, "apart", str(tmp_path), *command, script="tests/workers/teach_ranks.py", timeout=100)
    assert failed.returncode == 1, failed.stderr
    assert "error: --output = 'store': rank 1 on " in failed.stderr and "all machines share" in failed.stderr
    assert not (tmp_path / "0" / "store" / MANIFEST).exists()


def test_a_lost_rank_ends_the_others(tmp_path: Path) -> None:
    command = teach_command(config_in(tmp_path), tmp_path, "--output", str(tmp_path / "store"))
    failed = run_ranks(2, "lost", str(tmp_path), *command, script="tests/workers/teach_ranks.py", timeout=100)
    assert failed.returncode == 75, failed.stderr
    assert "ended without a word. Rank 0 on " in failed.stderr
    assert "stops too; run the same command again; finished shards stay" in failed.stderr


def test_no_manifest_without_all_shards(tmp_path: Path) -> None:
    origin = Origin("nll", "fp32", "t", "h", "fp32", "k", "c", "r", 8, 2, 2, 10, (0, 1, 2))
    writer = StoreWriter(tmp_path / "store", origin)
    assert writer.begin() == [0, 1]
    rows = {"nll": torch.ones(1), "tokens": torch.ones(1).long(), "source_rows": torch.zeros(1).long()}
    writer.write(1, np.array([0, 1]), rows)
    with pytest.raises(DataError, match=r"shard-00000.safetensors \(1 of 2 shards\) went away"):
        writer.finish(None)
    assert not (tmp_path / "store" / MANIFEST).exists() and StoreWriter(tmp_path / "store", origin).begin() == [0]


def test_shards_end_after_so_many_bytes_or_targets() -> None:
    assert shard_cuts(np.array([10, 10, 10, 50, 10]), 4, 170) == (0, 2, 3, 4, 5)
    # Sums of a row take no bytes a target; these rows are three million targets.
    assert shard_cuts(np.full(6, MOST_TARGETS // 2), 0, 2**28) == (0, 2, 4, 6)
    assert shard_cuts(np.array([2 * MOST_TARGETS, 1]), 0, 2**28) == (0, 1, 2)


def test_what_does_not_fit_is_refused_by_name(tmp_path: Path) -> None:
    config = config_in(tmp_path, method={"name": "lm_kd", "temperature": 2.0})
    store = tmp_path / "store"
    taught(config, store, "top_k", k=4, temperature=2.0)
    save_lm(tmp_path / "other", seed=9)
    wrong: list[tuple[str, dict[str, Any]]] = [
        ("method.temperature is 1.0", {"method": {"name": "lm_kd"}}),
        ("compares logits", {"method": {"name": "lm_kd", "temperature": 2.0, "divergence": "mse"}}),
        ("corpus", {"task": {**config["task"], "train_rows": 10}}),
        ("max_length: 48 in the store, 40 here", {"task": {**config["task"], "max_length": 40}}),
        (f"teacher: {tmp_path}/teacher", {"teacher": {"model": str(tmp_path / "other")}}),
    ]
    for message, sections in wrong:
        shutil.rmtree(tmp_path / "refused", ignore_errors=True)
        broken = offline(config | sections, store, "refused", **sections.get("teacher", {}))
        with pytest.raises((DataError, ConfigurationError), match=message):
            run(broken)
    tokenizer = byte_tokenizer(pad=False)  # the same tokens of the same texts
    tokenizer.add_special_tokens({"pad_token": "<other>"})
    tokenizer.save_pretrained(tmp_path / "tokens")
    student = {**config["student"], "tokenizer": str(tmp_path / "tokens")}
    shutil.rmtree(tmp_path / "refused")
    with pytest.raises(DataError, match=r"does not fit this run: tokenizer: \w{12} in the store"):
        run(offline(config | {"student": student}, store, "refused"))
    with pytest.raises(DataError, match=r"store of something else: teacher: .*other"):
        taught(config | {"teacher": {"model": str(tmp_path / "other")}}, store, "top_k", k=4, temperature=2.0)
    with pytest.raises(DataError, match="store of something else: k: 4 in the store, 5 here"):
        taught(config, store, "top_k", k=5, temperature=2.0)
    with pytest.raises(ConfigurationError, match=r"--k is 259; allowed: 1..258"):
        taught(config, tmp_path / "new", "top_k", k=259)
    assert not (tmp_path / "refused" / "student").exists()


def test_configurations_without_sense_are_refused(tmp_path: Path) -> None:
    config = config_in(tmp_path)
    for message, sections in [
        ("model is missing", {"teacher": {}}),
        ("or not at all", {"method": {"name": "finetune"}, "teacher": {"offline": "x"}}),
        ("mixed rows", {"method": {"name": "lm_kd", "tmkd_weight": 1.0}, "teacher": {"offline": "x"}}),
        ("could be partitioned", {"teacher": {"offline": "x", "zero_stage": 3}}),
        ("no teacher to take layers from", {"teacher": {"offline": "x"}, "student": {"num_layers": 1}}),
    ]:
        with pytest.raises(ConfigurationError, match=message):
            validate(Config, config | sections)
    with pytest.raises(DataError, match="holds no teacher store"):
        run(offline(config, tmp_path / "nowhere", "refused"))


def test_damage_is_found_and_mended(tmp_path: Path) -> None:
    config = config_in(tmp_path)
    store = tmp_path / "store"
    taught(config, store, "hidden")
    before = files_of(store)
    shard = store / "shard-00001.safetensors"
    content = bytearray(shard.read_bytes())
    content[-5] ^= 1  # the last row's hidden states, or what follows them
    content[len(content) // 2] ^= 1
    shard.write_bytes(bytes(content))
    assert main(["store", str(store)]) == 0 and main(["store", str(store), "--verify"]) == 1
    with pytest.raises(DataError, match=r"shard-00001.safetensors is damaged: it holds row \d+ with another checksum"):
        run(offline(config, store, "damaged"))
    assert taught(config, store, "hidden").num_written < OfflineStore(store, "x").origin.num_tokens
    assert files_of(store) == before
    shard.write_bytes(before[shard.name][:-1])
    with pytest.raises(DataError, match="bytes, and the manifest says"):
        OfflineStore(store, "x")


def test_a_full_disk_leaves_finished_shards(tmp_path: Path) -> None:
    config = config_in(tmp_path, instruct=True)
    (tmp_path / "config.json").write_text(json.dumps(config))
    arguments = ["--config", str(tmp_path / "config.json"), "--kind", "hidden", "--shard-mib", "0.02"]
    arguments += ["--output", str(tmp_path / "store")]
    small = "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, ({0}, {0})); "  # what a full disk would do
    code = "from mixkd_fast.cli import main; sys.exit(main(['teach', *sys.argv[1:]]))"
    limited, free = tmp_path / "limited.py", tmp_path / "free.py"
    taught(config, tmp_path / "sizes", "hidden", shard_mib=0.02)
    sizes = [path.stat().st_size for path in sorted((tmp_path / "sizes").glob("shard-*"))]
    assert max(sizes) > sizes[0]
    limited.write_text(small.format(sizes[0]) + code)
    failed = run_command([sys.executable, str(limited), *arguments])
    assert failed.returncode == 1 and "shards are finished and stay" in failed.stderr, failed.stderr
    done = {path.name: path.stat().st_ino for path in (tmp_path / "store").glob("shard-*.safetensors")}
    assert 0 < len(done) < len(sizes) and not list((tmp_path / "store").glob(".writing-*"))
    free.write_text("import sys; " + code)
    must_run([sys.executable, str(free), *arguments])
    assert files_of(tmp_path / "store") == files_of(tmp_path / "sizes")
    assert all((tmp_path / "store" / name).stat().st_ino == inode for name, inode in done.items())


def test_reading_maps_files_and_loads_none(tmp_path: Path) -> None:
    """The memory of a process that opens a large store and reads a row grows by far less than the store."""
    rows, width = 96, 65536  # 96 rows of 4 targets, 512 KiB each in bf16: 192 MiB
    cuts = (0, 32, 64, 96)
    origin = Origin("hidden", "bf16", "t", "h", "bf16", "k", "c", "r", 8, rows, rows * 4, 10, cuts, width=width)
    writer = StoreWriter(tmp_path / "store", origin)
    for number in writer.begin():
        hidden = torch.full((32 * 4, width), float(number), dtype=torch.bfloat16)
        writer.write(number, np.arange(0, 32 * 4 + 1, 4), {"hidden": hidden})
    writer.finish(None)
    code = """
import resource, sys
import numpy as np, psutil
from mixkd_fast.offline.reading import OfflineStore
from mixkd_fast.offline.records import MOST_TARGETS, shard_cuts
process = psutil.Process()
before = process.memory_info().rss
store = OfflineStore(sys.argv[1], "x")
found = store.rows(np.array([5, 40, 90]))["hidden"]
print(float(found.float().sum()), (process.memory_info().rss - before) / 2**20)
"""
    said = must_run([sys.executable, "-c", code, str(tmp_path / "store")])
    total, grown = map(float, said.split()[-2:])
    assert total == 4 * width * (0 + 1 + 2) and grown < 48, "three rows are 1.5 MiB of 192"


def test_errors_of_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = config_in(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config | {"teacher": None, "method": {"name": "finetune"}}))
    assert main(["teach", "--config", str(path), "--kind", "nll", "--output", str(tmp_path / "s")]) == 1
    assert "teacher.model is missing" in capsys.readouterr().err
    path.write_text(json.dumps(config))
    command = ["teach", "--config", str(path), "--kind", "top_k", "--output", str(tmp_path / "teacher")]
    assert main([*command, "--dtype", "bf16"]) == 1 and "allowed for top_k: fp16, fp32" in capsys.readouterr().err
    assert main(command) == 1 and "holds other files" in capsys.readouterr().err
    with pytest.raises(MixKDError, match="allowed: above 0"):
        taught(config, tmp_path / "s", "top_k", temperature=0.0)
