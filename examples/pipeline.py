"""Load a saved student through transformers.pipeline and ask it a few questions of the demo task.

python examples/pipeline.py runs/demo_mixkd/student
"""

import sys

from transformers import pipeline

QUESTIONS = [
    ("all red foxes run .", "all foxes run ."),
    ("exactly three poodles eat and swim .", "at least two dogs eat ."),
    ("no cats sleep .", "some black cats sleep ."),
]


def main(folder: str) -> list[str]:
    """Print premise, hypothesis, label and score. Returns the labels."""
    classify = pipeline("text-classification", model=folder)
    labels = []
    for premise, hypothesis in QUESTIONS:
        answer = classify({"text": premise, "text_pair": hypothesis})
        labels.append(answer["label"])
        print(f"{premise!r} -> {hypothesis!r}: {answer['label']} ({answer['score']:.2f})")
    return labels


if __name__ == "__main__":
    main(sys.argv[1])
