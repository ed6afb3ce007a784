"""What the README shows works: its losses example runs, its files exist, its tree names real modules."""

import re

import torch
from toy import ROOT

README = (ROOT / "README.md").read_text()


def test_the_losses_example_runs() -> None:
    block = next(text for text in re.findall(r"```python\n(.*?)```", README, re.S) if "kd_loss(" in text)
    names: dict[str, object] = {}
    exec(block, names)
    student_logits = names["student_logits"]
    assert isinstance(student_logits, torch.Tensor) and student_logits.grad is not None
    assert bool(student_logits.grad.abs().sum() > 0)


def test_files_it_names_exist() -> None:
    for name in re.findall(r"(?:configs|docs|examples|benchmarks)/[\w./]*\w", README):
        assert (ROOT / name).exists(), name


def test_its_tree_names_every_part_of_the_package() -> None:
    tree = README[README.index("## Where things are") :]
    named = set(re.findall(r"(\w+)\.py", tree))
    real = {path.stem for path in (ROOT / "mixkd_fast").glob("*.py")}
    elsewhere = {"setup", "build_flags", "reference", "mix_reference", "relation_reference"}
    elsewhere |= {path.stem for path in (ROOT / "benchmarks").glob("*.py")}
    assert named - elsewhere <= real, f"not there: {named - real}"


def test_make_targets_it_names_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"(?:^|`)make ([\w-]+)", README, re.M):
        assert re.search(rf"^{target}:", makefile, re.M), target


def test_no_placeholder_is_left() -> None:
    assert "_TABLE" not in README
