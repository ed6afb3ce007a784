"""Under ZeRO-3 no rank ever holds the whole teacher, neither while it is loaded nor while it is asked."""

import json

import pytest
from toy import must_run_ranks, save_toy_teacher

WORKER = "tests/workers/teacher_memory.py"
SHAPE = {"hidden_size": 640, "num_hidden_layers": 16, "num_attention_heads": 8, "intermediate_size": 2560}


@pytest.fixture(scope="module")
def figures(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, float]]]:
    """Stage -> what each of two ranks measured, for a teacher of 16 equal layers."""
    folder = tmp_path_factory.mktemp("memory")
    teacher = save_toy_teacher(folder / "teacher", **SHAPE)
    result = {}
    for stage in ("0", "3"):
        output = folder / stage
        output.mkdir()
        must_run_ranks(2, str(teacher), stage, str(output), script=WORKER)
        result[stage] = [json.loads((output / f"rank{rank}.json").read_text()) for rank in range(2)]
    result["size"] = (teacher / "model.safetensors").stat().st_size / 2**20
    return result


def test_whole_teacher_shows_in_the_measure(figures: dict[str, list[dict[str, float]]]) -> None:
    """The control: at stage 0 every rank holds all of it, so the measure below can fail."""
    assert all(rank["peak_mib"] >= figures["size"] for rank in figures["0"])


def test_no_rank_ever_holds_the_whole_teacher(figures: dict[str, list[dict[str, float]]]) -> None:
    for rank in figures["3"]:
        # Its half, two layers of sixteen that may be live, and buffers.
        assert rank["peak_mib"] < 0.8 * figures["size"], rank


def test_both_stages_give_the_same_logits(figures: dict[str, list[dict[str, float]]]) -> None:
    for rank in range(2):
        for whole, sharded in zip(figures["0"][rank]["logits"], figures["3"][rank]["logits"], strict=True):
            assert sharded == pytest.approx(whole, abs=1e-5)
