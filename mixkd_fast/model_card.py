"""The model card of a saved student: README.md with front matter that model hubs read."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mixkd_fast.page import number

_OBJECTIVES = {
    "finetune": "L = CE(S(x), y)",
    "kd": "L = mle_weight · CE(S(x), y) + kd_weight · d(T(x), S(x))",
    "mixkd": (
        "L = mle_weight · CE(S(x), y) + kd_weight · d(T(x), S(x)) + sm_weight · [λ CE(S(x'), y_i) + (1-λ) CE(S(x'), y_j)]"
        " + tmkd_weight · d(T(x'), S(x')),  x' = λ e(x_i) + (1-λ) e(x_j),  λ ~ Beta(alpha, alpha)"
    ),
}


def write_model_card(student_directory: Path, summary: Mapping[str, Any], config: Mapping[str, Any]) -> Path:
    """Write README.md beside the saved weights from a run's summary and resolved configuration. Returns its path."""
    task, method = summary["task"], config["method"]
    teacher = summary.get("teacher")
    lines = [*_front_matter(summary, config), f"# {task} student, {method['name']}", ""]
    made = f"distilled from `{teacher['model']}` by {method['name']}" if teacher else "fine-tuned"
    lines += [
        f"A sequence-classification model for the task *{task}*, {made} with mixkd_fast {summary['version']}.",
        "",
    ]
    lines += ["## Results", "", "| split | metric | student | teacher |", "| --- | --- | ---: | ---: |"]
    for split, values in summary["metrics"].items():
        theirs = (teacher or {}).get("metrics", {}).get(split, {})
        lines += [f"| {split} | {name} | {number(v)} | {number(theirs.get(name))} |" for name, v in values.items()]
    student, data, training = summary["student"], summary["data"], summary["training"]
    lines += ["", "## How it was made", ""]
    if teacher:
        lines.append(f"- Teacher: `{teacher['model']}`, {_model(teacher)}")
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
    lines += [
        f"- Training: {training['steps']:,} steps of {training['batch_size']} rows, {training['precision']}, "
        f"{training['ranks']} ranks on {training['device']}, student ZeRO {training['zero_stage']}",
        "",
        "## How to use it",
        "",
        "```python",
        "from transformers import pipeline",
        "",
        'classify = pipeline("text-classification", model="PATH_OF_THIS_FOLDER")',
        "```",
        "",
        "## Configuration",
        "",
        "<details><summary>the whole configuration of the run</summary>",
        "",
        "```json",
        json.dumps(config, indent=2),
        "```",
        "",
        "</details>",
        "",
        "Versions: " + ", ".join(f"{name} {version}" for name, version in summary["versions"].items()),
        "",
    ]
    path = student_directory / "README.md"
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def _model(model: Mapping[str, Any]) -> str:
    return (
        f"{model['model_type']}, {model['layers']} layers × {model['hidden_size']}, {model['parameters']:,} parameters"
    )


def _front_matter(summary: Mapping[str, Any], config: Mapping[str, Any]) -> list[str]:
    """YAML whose scalars are JSON, which YAML contains."""
    name = json.dumps(f"{summary['task']}-{config['method']['name']}")
    lines = ["---", "library_name: transformers", "pipeline_tag: text-classification"]
    lines += ["tags:", "- knowledge-distillation", f"- {json.dumps(config['method']['name'])}"]
    hub = config["task"].get("hub")
    if hub:
        lines += ["datasets:", f"- {json.dumps(hub)}"]
    results = [(split, key, value) for split, values in summary["metrics"].items() for key, value in values.items()]
    lines += ["metrics:"] + [f"- {json.dumps(key)}" for key in dict.fromkeys(key for _, key, _ in results)]
    lines += ["model-index:", f"- name: {name}", "  results:"]
    for split in summary["metrics"]:
        lines += ["  - task:", "      type: text-classification"]
        lines += [
            "    dataset:",
            f"      name: {json.dumps(summary['task'])}",
            f"      type: {json.dumps(summary['task'])}",
        ]
        lines += [f"      split: {json.dumps(split)}", "    metrics:"]
        for own_split, key, value in results:
            if own_split == split:
                lines += [f"    - type: {json.dumps(key)}", f"      value: {json.dumps(value)}"]
    return [*lines, "---", ""]
