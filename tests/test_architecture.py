"""The layers of the package: imports point one way, heavy dependencies have one home, names shadow nothing."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from toy import ROOT, environment

PACKAGE = ROOT / "mixkd_fast"
# From the top down; a module imports only from its own layer or from layers below it. A module of a package may have a
# layer of its own.
LAYERS = [
    {"cli", "train"},
    {"integrations"},
    {"cli_sweep"},
    {"sweep"},
    {"cli_evaluate", "cli_config", "cli_plan", "cli_select", "cli_store", "cli_teach", "distillation"},
    {"teaching"},
    {"summary"},
    {"run"},
    {"method_setting"},
    {"language_texts"},
    {"preparation"},
    {"language_preparation", "offline_preparation"},
    {"model_preparation"},
    {"extra_labelling"},
    {"frozen_teacher"},
    {"offline"},
    {"teacher"},
    {"engine"},
    {"distillation_module"},
    {"planning"},
    {
        *("compare", "evaluation", "generation", "interrupt", "language_models", "model_card", "models", "report"),
        *("run_folder", "saving", "schedule", "watching"),
    },
    {"adapters"},
    {"pretrained", "student_layers"},
    {"model_checks"},
    {"teacher_store"},
    {"extra_states", "step_records", "store_entries", "universal"},
    {
        *("causal_lm", "checkpoint", "console", "data", "deepspeed_config", "encoder", "facts", "metrics", "page"),
        "offline.manifest",
    },
    {"shared_folder"},
    {"fused_encoder"},
    {"encoder_parts", "encoder_tables", "packed_attention", "quantized_teacher"},
    {"sweep_file"},
    {"build_locks", "configuration", "distributed", "folder_lock"},
    {"config_errors", "host_memory", "partition", "strict_json", "teacher_section"},
    {"methods"},
    {"encoder_readings", "losses", "mix", "mixing"},
    {"linear_losses"},
    {
        "data.next_tokens",
        "errors",
        "language_task",
        "lora",
        "ops",
        "plan_section",
        "section",
        "version",
        "watch_process",
    },
]
HOMES = {
    "deepspeed": {"engine", "teacher", "integrations.frozen_model", "integrations.model_calls"},
    "transformers": {"models", "pretrained", "saving", "data.demo.tokenizer", "integrations.transformers_trainer"},
    "accelerate": {"integrations.mixed_rows", "integrations.token_loss", "integrations.transformers_trainer"},
    "trl": {"integrations.trl_gkd"},
    "peft": {"adapters"},
    "matplotlib": {"page", "report", "compare"},
}


def _modules() -> dict[str, ast.Module]:
    files = [path for path in PACKAGE.rglob("*.py") if path.name != "__init__.py" or path.parent != PACKAGE]
    return {
        ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__"): ast.parse(path.read_text())
        for path in files
    }


def _imports(tree: ast.Module, typing_only_too: bool = False) -> set[str]:
    """Every module named in an import, without those under `if TYPE_CHECKING`."""
    skipped: set[ast.AST] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            skipped.update(child for statement in node.body for child in ast.walk(statement))
    found = set()
    for node in ast.walk(tree):
        if node in skipped:
            continue
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, "absolute imports only: the script form puts the package folder on the path"
            found.add(node.module)
            found.update(f"{node.module}.{alias.name}" for alias in node.names if node.module == "mixkd_fast")
    return found


def test_every_module_has_a_layer() -> None:
    known = {name for name in set().union(*LAYERS) if "." not in name}
    assert {name.partition(".")[0] for name in _modules()} == known


def _level(module: str) -> int | None:
    """The layer of a module: its own where it has one, else its package's; None for what is not of this package."""
    level = {name: depth for depth, names in enumerate(LAYERS) for name in names}
    return level.get(module, level.get(module.partition(".")[0]))


def test_imports_point_one_way() -> None:
    wrong = []
    for name, tree in _modules().items():
        here = _level(name)
        for target in _imports(tree):
            package, _, module = target.partition(".")
            there = _level(module) if package == "mixkd_fast" else None
            if here is not None and there is not None and there < here:
                wrong.append(f"{name} imports {target}")
    assert not wrong


@pytest.mark.parametrize("package", HOMES)
def test_heavy_dependencies_have_one_home(package: str) -> None:
    users = {n for n, tree in _modules().items() if any(i.partition(".")[0] == package for i in _imports(tree))}
    assert users <= HOMES[package]


def test_no_module_shadows_another_package() -> None:
    """`deepspeed mixkd_fast/train.py` puts the package folder on the path."""
    installed = {
        "datasets",
        "deepspeed",
        "evaluate",
        "matplotlib",
        "ninja",
        "numpy",
        "peft",
        "torch",
        "transformers",
        "triton",
    }
    own = {path.stem for path in PACKAGE.iterdir() if path.stem != "__init__"}
    assert not own & (installed | set(sys.stdlib_module_names))


def test_losses_need_torch_alone() -> None:
    """`pip install mixkd-fast` without extras: everything but torch's own needs is hidden."""
    code = """
import importlib.abc, sys
class Hide(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"transformers", "datasets", "deepspeed", "pydantic", "scipy", "sklearn",
                                      "matplotlib", "tqdm", "psutil", "safetensors", "tokenizers"}:
            raise ModuleNotFoundError(f"{name} is hidden", name=name)
sys.meta_path.insert(0, Hide())
import torch
from mixkd_fast import KDLoss, kd_loss, __version__
student = torch.randn(4, 3, requires_grad=True)
kd_loss(student, torch.randn(4, 3), torch.tensor([0, 1, 2, 0]), temperature=2.0, ce_weight=1.0).backward()
assert student.grad.abs().sum() > 0 and torch.isfinite(KDLoss(temperature=2.0)(student, torch.randn(4, 3)))
try:
    from mixkd_fast import distill
except ModuleNotFoundError as error:
    print("distill needs", error.name)
"""
    done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("distill needs ")


@pytest.mark.parametrize(
    ("name", "hidden", "extra"),
    [
        ("DistillTrainer", "transformers", "transformers"),
        ("DistillTrainer", "accelerate", "transformers"),
        ("GKDTrainer", "trl", "trl"),
    ],
)
def test_integrations_name_the_package_that_is_missing(name: str, hidden: str, extra: str) -> None:
    """The package itself loads without any of them."""
    code = f"""
import importlib.abc, sys
class Hide(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == {hidden!r}:
            raise ModuleNotFoundError(f"{{name}} is hidden", name=name)
sys.meta_path.insert(0, Hide())
import mixkd_fast, mixkd_fast.integrations as integrations
assert not {{"transformers", "accelerate", "trl", "deepspeed", "pydantic"}} & set(sys.modules)
try:
    integrations.{name}
except ModuleNotFoundError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{name} needs the package '{hidden}"), done.stdout
    assert f"mixkd-fast[{extra}]" in done.stdout


def test_train_script_stays_thin() -> None:
    assert len((PACKAGE / "train.py").read_text().splitlines()) < 80


def test_no_file_is_longer_than_400_lines() -> None:
    folders = (PACKAGE, ROOT / "tests", ROOT / "benchmarks", ROOT / "examples")
    files = [path for folder in folders for path in Path(folder).rglob("*.py")]
    assert not {str(path): n for path in files if (n := len(path.read_text().splitlines())) > 400}
