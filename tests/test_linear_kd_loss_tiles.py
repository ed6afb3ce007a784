"""linear_kd_loss without logits: tiles of the vocabulary, on one process and over the ranks of a process group."""

import functools
import gc
import json
import os
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import SETTINGS, setting_id
from linear_cases import ROUNDING, check_against_truth, gradients_of, in_double, make_heads
from test_linear_kd_loss_kernels import MIB, peak_of
from toy import ROOT, environment

from mixkd_fast.losses import TopK, linear_kd_loss, vocabulary_slice

SUMMED = [setting for setting in SETTINGS if setting["divergence"] != "adaptive_kl"]
check_exactly = functools.partial(check_against_truth, tolerance=1e-10)


@pytest.mark.parametrize("max_logits_mib", [0.01, 512])
@pytest.mark.parametrize("setting", SUMMED, ids=setting_id)
def test_the_formula(setting: dict[str, Any], max_logits_mib: float) -> None:
    """In tiles of a few classes and a few rows, and in a single one."""
    arguments = in_double(make_heads(rows=(3, 5)))
    options = {"temperature": 2.0, "kd_weight": 0.7, "ce_weight": 0.3, "logit_free": True, **setting}
    for reduction in ("mean", "none"):
        check_exactly(arguments, reduction, max_logits_mib=max_logits_mib, **options)


@pytest.mark.parametrize("changes", [{"classes": 15, "teacher_classes": 29}, {"classes": 29, "teacher_classes": 15}])
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "mse"])
def test_vocabularies_of_unequal_width(changes: dict[str, int], divergence: str) -> None:
    arguments = in_double(make_heads(**changes))
    for ce_weight in (0.0, 0.5):
        options = {"divergence": divergence, "ce_weight": ce_weight, "temperature": 1.5, "logit_free": True}
        check_exactly(arguments, "sum", max_logits_mib=0.004, **options)


@pytest.mark.parametrize("divergence", ["forward_kl", "jsd"])
def test_softcap_scale_and_bias(divergence: str) -> None:
    arguments = in_double(make_heads(rows=(3, 4), spread=6.0))
    arguments |= {"student_softcap": 5.0, "teacher_softcap": 8.0, "student_scale": 0.7, "teacher_scale": -1.3}
    for reduction in ("mean", "none"):
        options = {"ce_weight": 0.5, "temperature": 2.0, "divergence": divergence, "logit_free": True}
        check_exactly(arguments, reduction, max_logits_mib=0.01, **options)


def test_hard_labels_alone() -> None:
    arguments = in_double(make_heads())
    arguments = {name: None if name.startswith("teacher") else value for name, value in arguments.items()}
    check_exactly(arguments, "mean", kd_weight=0.0, ce_weight=1.0, logit_free=True, max_logits_mib=0.004)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd"])
def test_lower_precision(divergence: str, dtype: torch.dtype) -> None:
    arguments = make_heads((40,), 2000, widths=(64, 64), dtype=dtype)
    options = {"temperature": 2.0, "ce_weight": 0.3, "divergence": divergence, "logit_free": True}
    check_against_truth(arguments, "mean", ROUNDING[dtype], max_logits_mib=0.5, **options)


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl"])
def test_distributions_far_apart(divergence: str) -> None:
    arguments = make_heads((16,), 500, widths=(64, 64), spread=30.0, bias=False)
    options = {"divergence": divergence, "ce_weight": 0.3, "logit_free": True}
    check_against_truth(arguments, "mean", 1e-4, max_logits_mib=0.1, **options)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_dropped_rows_and_frozen_parts(reduction: Any) -> None:
    arguments = in_double(make_heads(rows=(4, 5)))
    keep = (arguments["labels"] != -100) & (arguments["row_weights"] != 0)
    arguments["student_hidden"].data[~keep] = torch.nan
    arguments["teacher_hidden"][~keep] = torch.nan
    options: dict[str, Any] = {"ce_weight": 0.5, "reduction": reduction, "logit_free": True}
    loss = linear_kd_loss(**arguments, **options)
    expected = gradients_of(loss, arguments, torch.ones_like(loss))
    assert loss.isfinite().all() and (expected["student_hidden"][~keep] == 0).all()
    for frozen in ("student_hidden", "student_weight", "student_bias"):
        given = {**arguments, frozen: arguments[frozen].detach()}
        gradients = gradients_of(linear_kd_loss(**given, **options), given, torch.ones_like(loss))
        torch.testing.assert_close(gradients, {name: expected[name] for name in gradients})
        assert frozen not in gradients


def test_a_nan_row_stays_alone_and_no_rows_are_nothing() -> None:
    arguments = make_heads(hard=False)
    arguments["student_hidden"].data[3] = torch.nan
    for divergence in ("forward_kl", "jsd"):
        loss = linear_kd_loss(**arguments, reduction="none", logit_free=True, divergence=divergence)
        assert loss.isnan().tolist() == [row == 3 for row in range(9)]
        gradient = gradients_of(loss, arguments, torch.ones_like(loss))["student_hidden"]
        assert gradient[3].isnan().all() and gradient[[0, 1, 2, 4]].isfinite().all()
    empty = make_heads(rows=(0,))
    assert linear_kd_loss(**empty, logit_free=True) == 0


def test_the_graph_may_be_used_twice() -> None:
    arguments = in_double(make_heads())
    loss = linear_kd_loss(**arguments, logit_free=True)
    first = gradients_of(loss, arguments)
    again = gradients_of(loss, arguments, torch.tensor(-3.0, dtype=torch.float64))
    torch.testing.assert_close(again, {name: -3 * gradient for name, gradient in first.items()})


@pytest.mark.parametrize("name", ["teacher_hidden", "teacher_weight", "labels", "lam", "row_weights"])
def test_whoever_changes_what_the_backward_reads_is_told(name: str) -> None:
    arguments = make_heads()
    loss = linear_kd_loss(**arguments, reduction="none", logit_free=True, ce_weight=0.5).sum()
    arguments[name].zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_reduced_loss_lets_go_of_the_teacher() -> None:
    arguments = make_heads()
    array = arguments["teacher_hidden"].numpy()
    arguments["teacher_hidden"] = torch.from_numpy(array)
    held = weakref.ref(array)
    loss = linear_kd_loss(**arguments, logit_free=True)
    del array
    assert held() is not None
    del arguments
    gc.collect()
    assert held() is None
    loss.backward()


@pytest.mark.parametrize("divergence", ["forward_kl", pytest.param("jsd", marks=pytest.mark.slow)])
def test_memory(divergence: str) -> None:
    """Whole logits of both sides would be 1 GiB; gradients and their sums are 14 MiB."""
    arguments = make_heads((1024,), 131072, widths=(8, 8), bias=False, hard=False)
    peak = peak_of(512, arguments, divergence=divergence, logit_free=True)
    assert peak < (64 + 14) * MIB, f"{peak / MIB} MiB"


def test_refusals() -> None:
    arguments = make_heads()
    with pytest.raises(ValueError, match="labels holds 40; allowed: 0 to 36, or ignore_index -100"):
        linear_kd_loss(**{**arguments, "labels": torch.full((9,), 40)}, logit_free=True)
    top = TopK(torch.zeros(9, 1).long(), torch.zeros(9, 1))
    changes = {"teacher_hidden": top, "teacher_weight": None, "teacher_bias": None}
    with pytest.raises(ValueError, match="logit_free cannot be had with a TopK"):
        linear_kd_loss(**{**arguments, **changes}, logit_free=True)


def test_slices_of_a_vocabulary() -> None:
    for sides in ((10, 10), (9, 13), (151936, 152064), (3, 1)):
        for num_ranks in (1, 2, 3, 8):
            slices = [
                [vocabulary_slice(*pair, rank, num_ranks) for rank in range(num_ranks)] for pair in (sides, sides[::-1])
            ]
            for classes, parts in zip(sides, slices, strict=True):
                rows = [row for part in parts for row in range(classes)[part]]
                assert rows == list(range(classes))
            for first, second in zip(*slices, strict=True):
                assert first.start == second.start or min(first.stop - first.start, second.stop - second.start) == 0


def test_two_ranks_are_one(tmp_path: Path) -> None:
    """Each holds half of the vocabulary: loss, rows, gradient of hidden states, and its half of the others'."""
    command = [sys.executable, str(ROOT / "tests" / "workers" / "linear_ranks.py"), str(tmp_path)]
    places = os.pathsep.join([str(ROOT / "tests"), str(ROOT)])
    ranks = [
        subprocess.Popen(
            [*command, str(rank)],
            env=environment() | {"PYTHONPATH": places},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        for rank in range(2)
    ]
    outputs = [rank.communicate(timeout=240)[0].decode() for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(outputs)
    compared = json.loads(outputs[0].splitlines()[-1])
    assert compared["cases"] > 40 and compared["largest"] < 1e-9


def test_torch_compile_breaks_its_graph_and_nothing_else() -> None:
    arguments = make_heads((12,), 100, widths=(16, 8))
    names = ("student_hidden", "student_weight")
    fixed = {name: value for name, value in arguments.items() if name not in names}

    def loss_of(hidden: Any, weight: Any) -> Any:
        return linear_kd_loss(hidden.tanh(), weight, **fixed, ce_weight=0.5, divergence="jsd", logit_free=True) * 2

    torch.compiler.reset()
    results = []
    for function in (loss_of, torch.compile(loss_of, backend="aot_eager")):
        loss = function(*(arguments[name] for name in names))
        results.append((loss.detach(), gradients_of(loss, arguments, torch.full_like(loss, 3.0))))
    torch.testing.assert_close(results[1], results[0])
