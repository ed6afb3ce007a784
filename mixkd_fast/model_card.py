"""The model card of a saved student: README.md with front matter that model hubs read."""

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mixkd_fast.data.tasks import KNOWN_TASKS
from mixkd_fast.page import number

_OBJECTIVES = {
    "cilda": (
        "L = mle_weight · CE(S(x), y) + kd_weight · d(T(x), S(x)) + adversarial_weight · d(T(x'), S(x')) + "
        "contrastive_weight · InfoNCE, x' rewritten by a generator that maximises what depends on it"
    ),
    "dml": "L_i = mle_weight · CE(S_i(x), y) + mutual_weight / (K-1) · Σ_j τ² KL(p_j ‖ p_i), K students",
    "ensemble": (
        "L = mle_weight · CE(S(x), y) + kd_weight · d(mean_n T_n(x), S(x)) + sm_weight · [λ CE(S(x'), y_i) + "
        "(1-λ) CE(S(x'), y_j)] + tmkd_weight · d(mean_n T_n(x'), S(x')); the mean is taken over probabilities"
    ),
    "finetune": "L = CE(S(x), y)",
    "inheritance": (
        "L = mean over masked tokens of (1-r) · CE(S(m), w) + r · τ² KL(T(m) ‖ S(m)), r = max(0, 1 - t/T_kd), "
        "+ mle_weight · CE(S(x), y)"
    ),
    "lm_kd": (
        "L = (1-w) · CE(S(x), y) + w · τ² D(T(x), S(x)), the mean over tokens, w = kd_weight, "
        "+ sm_weight · [λ CE(S(x'), y_i) + (1-λ) CE(S(x'), y_j)] + tmkd_weight · τ² D(T(x'), S(x'))"
    ),
    "kd": "L = mle_weight · CE(S(x), y) + kd_weight · d(T(x), S(x))",
    "mixkd": (
        "L = mle_weight · CE(S(x), y) + kd_weight · d(T(x), S(x)) + sm_weight · "
        "[λ CE(S(x'), y_i) + (1-λ) CE(S(x'), y_j)] + tmkd_weight · d(T(x'), S(x')),  "
        "x' = λ e(x_i) + (1-λ) e(x_j),  λ ~ Beta(alpha, alpha)"
    ),
    "reffakd": "L = (1-alpha) · CE(S(x), y) + alpha · τ² KL(p_y ‖ q), p_y a soft label of class y from an autoencoder",
    "cckd": "L = mle_weight · (1-w) · CE(S(x), y) + kd_weight · w · d(T(x), S(x)),  w = p_T(y)",
    "label_revision": "L = mle_weight · CE(S(x), y) + kd_weight · chosen · τ² KL(p̃ ‖ q),  argmax p̃ = y",
    "data_partition": (
        "L = mle_weight · CE(S(x), y) + kd_weight · d(z, S(x)),  z of the teacher or of the initial student"
    ),
    "rdd": (
        "stage 1: L = mle_weight · exp(-KL(p' ‖ p'')) · CE(S(x), y),  stage 2: L = mle_weight · CE(S(x), y) + "
        "kd_weight · d(T(x), S(x)) on rows that are hard for exactly one of both"
    ),
}


def write_model_card(student_directory: Path, summary: Mapping[str, Any], config: Mapping[str, Any]) -> Path:
    """Write README.md beside the saved weights from a run's summary and resolved configuration. Returns its path."""
    task, method = summary["task"], config["method"]
    teacher = summary.get("teacher")
    lines = [*_front_matter(summary, config), f"# {task} student, {method['name']}", ""]
    made = f"distilled from `{teacher['model']}` by {method['name']}" if teacher else "fine-tuned"
    lines += [
        f"A {_KINDS[_pipeline(summary)]} for the task *{task}*, {made} with mixkd_fast {summary['version']}.",
        "",
    ]
    lines += ["## Results", "", "| split | metric | student | teacher |", "| --- | --- | ---: | ---: |"]
    for split, values in summary["metrics"].items():
        theirs = (teacher or {}).get("metrics", {}).get(split, {})
        lines += [f"| {split} | {name} | {number(v)} | {number(theirs.get(name))} |" for name, v in values.items()]
    student, data, training = summary["student"], summary["data"], summary["training"]
    lines += ["", "## How it was made", ""]
    if teacher:
        known = _model(teacher) if "layers" in teacher else "not loaded"
        if "offline" in teacher:
            known += f"; its answers to the training rows from a store of kind {teacher['offline']['kind']}"
        lines.append(f"- Teacher: `{teacher['model']}`, {known}")
    lines += [
        f"- Student: {_model(student)}",
        f"- Data: {data['train_rows']:,} training rows ({data['extra_rows']:,} of them extra), at most "
        f"{data['max_length']} tokens; evaluated on "
        + ", ".join(f"{count:,} rows of {split}" for split, count in data["evaluation_rows"].items()),
        f"- Method: {method['name']}, "
        + (", ".join(f"{key} = {value}" for key, value in method.items() if key != "name") or "no options"),
    ]
    if method["name"] in _OBJECTIVES:
        lines.append(f"- Objective: {_OBJECTIVES[method['name']]}")
    shown = json.dumps(config, indent=2, ensure_ascii=False)
    # Longer than any row of backticks inside, so that none of them ends the block.
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", shown)), default=0))
    lines += [
        f"- Training: {training['steps']:,} steps of {training['batch_size']} rows, {training['precision']}, "
        f"ranks: {training['ranks']}, on {training['device']}, student ZeRO {training['zero_stage']}",
        "",
        "## How to use it",
        "",
        "```python",
        "from transformers import pipeline",
        "",
        *_calls(summary, config),
        "```",
        "",
        "## Configuration",
        "",
        "<details><summary>the whole configuration of the run</summary>",
        "",
        f"{fence}json",
        shown,
        fence,
        "",
        "</details>",
        "",
        "Versions: " + ", ".join(f"{name} {version}" for name, version in summary["versions"].items()),
        "",
    ]
    path = student_directory / "README.md"
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


_KINDS = {"text-classification": "sequence-classification model", "text-generation": "causal language model"}


def _pipeline(summary: Mapping[str, Any]) -> str:
    """The task of a transformers pipeline."""
    return "text-generation" if summary.get("kind") == "causal_lm" else "text-classification"


def _model(model: Mapping[str, Any]) -> str:
    shape = f"{model['layers']} layers of width {model['hidden_size']}"
    return f"{model['model_type']}, {shape}, {model['parameters']:,} parameters"


def _calls(summary: Mapping[str, Any], config: Mapping[str, Any]) -> list[str]:
    """How the pipeline is made and called for this task: a text or a pair, a class or a number, or a text to go on."""
    if _pipeline(summary) == "text-generation":
        return [
            'write = pipeline("text-generation", model="PATH_OF_THIS_FOLDER")',
            'print(write("Once upon a time", max_new_tokens=50)[0]["generated_text"])',
        ]
    task = config["task"]
    known = KNOWN_TASKS.get(task["name"])
    pair = task.get("text_pair_column") or (known.text_pair if known else None)
    regression = any("mse" in values for values in summary["metrics"].values())
    text = '{"text": "First text.", "text_pair": "Second text."}' if pair else '"A text."'
    made = 'classify = pipeline("text-classification", model="PATH_OF_THIS_FOLDER")'
    return [made, f"print(classify({text}{', function_to_apply=' + repr('none') if regression else ''}))"]


def _hub_name(config: Mapping[str, Any]) -> str | None:
    """The hub data set of the rows, if they came from one."""
    task = config["task"]
    if task.get("hub") or task.get("train_files"):
        return task.get("hub") if not task.get("train_files") else None
    known = KNOWN_TASKS.get(task["name"])
    return known.hub if known else None


def _front_matter(summary: Mapping[str, Any], config: Mapping[str, Any]) -> list[str]:
    """YAML with every scalar of the user's in double quotes; figures that are not finite are left out."""
    hub, method = _hub_name(config), config["method"]["name"]
    distilled = ["knowledge-distillation"] if summary.get("teacher") and method != "finetune" else []
    lines = ["---", "library_name: transformers", f"pipeline_tag: {_pipeline(summary)}", "tags:"]
    lines += [f"- {_quoted(tag)}" for tag in [*distilled, method]]
    if hub:
        lines += ["datasets:", f"- {_quoted(hub)}"]
    results = {
        split: {key: value for key, value in values.items() if value is not None and math.isfinite(value)}
        for split, values in summary["metrics"].items()
    }
    results = {split: values for split, values in results.items() if values}
    if results:
        lines += ["metrics:"] + [f"- {_quoted(key)}" for key in dict.fromkeys(k for v in results.values() for k in v)]
        lines += ["model-index:", f"- name: {_quoted(summary['task'] + '-' + method)}", "  results:"]
    for split, values in results.items():
        lines += ["  - task:", f"      type: {_pipeline(summary)}", "    dataset:"]
        lines += [f"      name: {_quoted(summary['task'])}", f"      type: {_quoted(hub or summary['task'])}"]
        lines += [f"      split: {_quoted(split)}", "    metrics:"]
        for key, value in values.items():
            lines += [f"    - type: {_quoted(key)}", f"      value: {json.dumps(value)}"]
    return [*lines, "---", ""]


def _quoted(text: str) -> str:
    """A double-quoted YAML scalar: JSON's, but with only those characters escaped that YAML cannot print."""
    unprintable = re.compile("[^\x20-\x7e\xa0-\u2027\u202a-\ud7ff\ue000-\ufefe\uff00-\ufffd\U00010000-\U0010ffff]")
    return unprintable.sub(lambda match: f"\\u{ord(match[0]):04x}", json.dumps(text, ensure_ascii=False))
