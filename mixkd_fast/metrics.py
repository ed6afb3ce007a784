"""Task metrics (scikit-learn, scipy) and the figures that show how well the student follows the teacher.

Legend of shape suffixes: N rows, C classes.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import log_softmax, softmax
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

Floats = NDArray[np.float64]


def evaluate_predictions(
    logits: NDArray[np.floating[Any]],
    labels: NDArray[np.generic],
    names: list[str],
    teacher_logits: NDArray[np.floating[Any]] | None = None,
) -> dict[str, float]:
    """All figures of one evaluation.

    Args: logits [N, C], or [N, 1] for a regression; labels [N] class numbers or targets; names of task metrics
    (accuracy, f1, matthews, pearson, spearman); teacher_logits [N, C'] if there is a teacher.
    Returns: the named metrics (f1 is that of class 1 where there are two, else the mean over the classes), then for
    classification nll (nats), ece (15 bins), teacher_agreement (share of rows with the same arg max) and kl_to_teacher
    (mean KL(teacher || student) at temperature 1, nats); for regression mse and teacher_mse.
    """
    scores = logits.astype(np.float64)
    if scores.shape[1] == 1:
        result = {name: _regression_metric(name, scores[:, 0], labels) for name in names}
        result["mse"] = float(np.mean((scores[:, 0] - labels.astype(np.float64)) ** 2))
        if teacher_logits is not None:
            result["teacher_mse"] = float(np.mean((scores[:, 0] - teacher_logits[:, 0]) ** 2))
        return result
    predictions = scores.argmax(axis=1)
    result = {name: _classification_metric(name, predictions, labels, scores.shape[1]) for name in names}
    log_q_NC = log_softmax(scores, axis=1)
    result["nll"] = float(-log_q_NC[np.arange(len(labels)), labels].mean())
    result["ece"] = expected_calibration_error(softmax(scores, axis=1), labels)
    if teacher_logits is not None:
        teacher = teacher_logits.astype(np.float64)
        result["teacher_agreement"] = float(np.mean(teacher.argmax(axis=1) == predictions))
        log_p_NC = log_softmax(teacher, axis=1)
        result["kl_to_teacher"] = float((np.exp(log_p_NC) * (log_p_NC - log_q_NC)).sum(axis=1).mean())
    return result


def expected_calibration_error(probabilities_NC: Floats, labels: NDArray[np.generic], num_bins: int = 15) -> float:
    """ECE (Guo et al. 2017): mean |accuracy - confidence| over equal-width confidence bins, weighted by their rows."""
    confidence = probabilities_NC.max(axis=1)
    correct = probabilities_NC.argmax(axis=1) == labels
    gap_rows = np.asarray(correct, dtype=np.float64) - confidence
    bins = np.clip(np.ceil(confidence * num_bins).astype(int) - 1, 0, num_bins - 1)
    gap = np.bincount(bins, weights=gap_rows, minlength=num_bins)
    return float(np.abs(gap).sum() / len(labels))


def _classification_metric(
    name: str, predictions: NDArray[np.intp], labels: NDArray[np.generic], classes: int
) -> float:
    if name == "accuracy":
        return float(accuracy_score(labels, predictions))
    if name == "f1":
        average = "binary" if classes == 2 else "macro"
        return float(f1_score(labels, predictions, average=average, zero_division=0.0))
    if name == "matthews":
        return float(matthews_corrcoef(labels, predictions))
    raise ValueError(f"task.metrics: {name!r} is not a metric of a classification (accuracy, f1, matthews)")


def _regression_metric(name: str, predictions: Floats, labels: NDArray[np.generic]) -> float:
    if name not in ("pearson", "spearman"):
        raise ValueError(f"task.metrics: {name!r} is not a metric of a regression (pearson, spearman)")
    if len(labels) < 2 or np.ptp(predictions) == 0 or np.ptp(labels) == 0:
        return 0.0  # a correlation with a constant is undefined; no skill counts as 0
    correlation = pearsonr if name == "pearson" else spearmanr
    return float(correlation(predictions, labels).statistic)


def evaluate_language(answers_N3: NDArray[np.floating[Any]], names: list[str]) -> dict[str, float]:
    """Figures of a causal language model, the named ones first: perplexity, nll (nats per token), token_accuracy.

    Means over all targets, each token counting alike: perplexity = exp(sum of nll / number of targets).
    Args: answers_N3 as of `CausalLM.answers`.
    """
    nll, correct, targets = answers_N3.astype(np.float64).sum(axis=0)
    mean = nll / max(targets, 1.0)
    values = {"perplexity": float(np.exp(mean)), "nll": float(mean), "token_accuracy": float(correct / max(targets, 1))}
    return {name: values[name] for name in dict.fromkeys([*names, *values]) if name in values}


def rouge_l(references: Sequence[str], answers: Sequence[str]) -> float:
    """Mean F-measure of ROUGE-L (longest common subsequence of stemmed words), by the rouge-score library."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    pairs = zip(references, answers, strict=True)
    return float(np.mean([scorer.score(reference, answer)["rougeL"].fmeasure for reference, answer in pairs]))
