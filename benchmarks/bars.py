"""The bars that the fused ops are held against, and predictions for GPUs that were not at hand."""

from collections.abc import Iterator
from typing import Any

from benchmarks.cases import CUDA_VOCABULARIES

# GB/s of the memory as published by the maker; a copy reaches 85 to 92 % of it.
PUBLISHED_BANDWIDTH = {"A100 80GB SXM": 2039.0, "H100 SXM": 3350.0, "H200 SXM": 4800.0}
MIN_WIDE_CLASSES = 32000
NARROW_SPEEDUP = {"cpu": {(64, 3): 2.5, (4096, 3): 4.0, (256, 1000): 4.0}}
MIX_SPEEDUP = {"cpu": (2.0, 3.0), "cuda": (2.0, 4.0), "triton": (2.0, 4.0)}


def predicted_ms(num_bytes: int, bandwidth_gb_per_s: float, share: float = 1.0) -> float:
    """A prediction: milliseconds to move `num_bytes` (read + written) at `share` of a memory bandwidth."""
    return num_bytes / (bandwidth_gb_per_s * share) * 1e-6


def predictions(device_name: str) -> list[dict[str, Any]]:
    """kd_loss, forward KL with gradient, 8192 rows in bf16, on every known GPU but the one measured."""
    return [
        {
            "label": "prediction",
            "device": device,
            "case": f"forward_kl 8192x{classes} bf16",
            "floor_bytes": (num_bytes := 3 * 2 * 8192 * classes),
            "predicted_ms": predicted_ms(num_bytes, bandwidth),
        }
        for device, bandwidth in PUBLISHED_BANDWIDTH.items()
        if not device_name.replace("NVIDIA ", "").startswith(device.split()[0])
        for classes in CUDA_VOCABULARIES
    ]


def bars(results: list[dict[str, Any]], device: dict[str, Any]) -> list[dict[str, Any]]:
    """Every bar that speaks of a case in `results`: what was measured, what is asked, passed or not.

    Args: device as in the report: "type" is "cpu" or "cuda", "capability" the GPU's compute capability.
    Returns: entries of op, case, backend, bar, measured (None: the backend is not there), limit, at_most, passed.
    """
    backends = ("cpu",) if device["type"] == "cpu" else ("cuda", "triton")
    found = []
    for result in results:
        arms = {arm["name"]: arm for arm in result["arms"]}
        rules = RULES[result["op"]]
        for backend in backends:
            for text, measured, limit, at_most in rules(result, arms, backend, device):
                passed = None if measured is None else measured <= limit if at_most else measured >= limit
                found.append(
                    {
                        "op": result["op"],
                        "case": result["case"]["name"],
                        "backend": backend,
                        "bar": text,
                        "measured": measured,
                        "limit": limit,
                        "at_most": at_most,
                        "passed": passed,
                    }
                )
    return found


def speedup(arms: dict[str, dict[str, Any]], name: str, kind: str = "eager") -> float | None:
    """How many times faster arm `name` is than the fastest timed arm of a kind; where nobody writes the case in eager
    PyTorch, the reference stands for it."""
    others = [arm["time"]["median_ms"] for arm in arms.values() if "time" in arm and arm["kind"] == kind]
    if kind == "eager" and not others and (reference := _median(arms, "reference")) is not None:
        others = [reference]
    own = _median(arms, name)
    return min(others) / own if own is not None and others else None


Rule = tuple[str, float | None, float, bool]


def _kd_rules(
    result: dict[str, Any], arms: dict[str, dict[str, Any]], backend: str, device: dict[str, Any]
) -> Iterator[Rule]:
    case = result["case"]
    if case["mixed"]:
        limit = NARROW_SPEEDUP.get(backend, {}).get((case["rows"], case["classes"]), 4.0)
        yield "times faster than eager", speedup(arms, backend), limit, False
        return
    if case["classes"] < MIN_WIDE_CLASSES:
        return
    of_copy = arms.get(backend, {}).get("fraction_of_copy")
    is_kl = case["divergence"] in ("forward_kl", "reverse_kl")
    if backend == "cpu":
        if not is_kl:
            yield "times forward KL's time", _against_forward(arms, backend), 1.5, True
        elif case["dtype"] == "fp32":
            yield "times what 1.5 clones take", None if of_copy is None else 1 / of_copy, 1.1, True
            yield "times faster than eager", speedup(arms, backend), 8.0, False
            yield "times faster than torch.compile", speedup(arms, backend, "compile"), 1.4, False
        return
    hopper = device["capability"][0] == 9 and backend == "cuda"
    if is_kl:
        limit = 0.75
        if backend == "cuda":
            limit = 0.9 if hopper else 0.88 if case["classes"] <= MIN_WIDE_CLASSES else 0.75
        if not hopper or case["classes"] == CUDA_VOCABULARIES[0]:
            yield "of a copy's rate", of_copy, limit, False
    elif hopper:
        yield "of a copy's rate", of_copy, 0.6, False
    else:
        yield "times forward KL's time", _against_forward(arms, backend), 1 / 0.8, True


def _mix_rules(
    result: dict[str, Any], arms: dict[str, dict[str, Any]], backend: str, device: dict[str, Any]
) -> Iterator[Rule]:
    limit = MIX_SPEEDUP[backend][int(result["case"]["full"])]
    yield "times faster than eager", speedup(arms, backend), limit, False
    if device["type"] == "cuda" and not result["case"]["backward"]:
        yield "of a copy's rate", arms.get(backend, {}).get("fraction_of_copy"), 0.85, False


def _relation_rules(
    result: dict[str, Any], arms: dict[str, dict[str, Any]], backend: str, device: dict[str, Any]
) -> Iterator[Rule]:
    if backend == "cuda":
        return  # GPUs have Triton's kernels alone
    yield "times faster than eager", speedup(arms, backend), 1.0, False
    own, eager = (arms.get(name, {}).get("peak_bytes") for name in (backend, "eager"))
    yield "of eager's peak memory", own / eager if own and eager else None, 1.0, True


def _linear_rules(
    result: dict[str, Any], arms: dict[str, dict[str, Any]], backend: str, device: dict[str, Any]
) -> Iterator[Rule]:
    case = result["case"]
    yield "times faster than eager", speedup(arms, backend), 1.0, False
    for name, limit in ((backend, 0.6 * 1024), (f"{backend}, logit-free", 64.0)):
        yield f"MiB beside the gradients ({name})", _mib_beside_gradients(result, arms.get(name, {})), limit, True
    if device["type"] != "cuda" or case["rows"] < 8192:
        return
    if case["divergence"] == "forward_kl" and backend == "cuda":
        limit = 660.0 if device["capability"][0] == 9 else 235.0
        rates = [arms.get(name, {}).get("tflop_per_s") for name in (backend, f"{backend}, 2048 MiB")]
        yield "TFLOP/s", max((rate for rate in rates if rate is not None), default=None), limit, False
    if case["divergence"] == "jsd":
        own = _median(arms, backend)
        for peer, limit in (("Liger-Kernel fused", 3.0), ("Liger-Kernel chunked", 1.6)):
            other = _median(arms, peer)
            yield f"times faster than {peer}", None if own is None or other is None else other / own, limit, False


def _mib_beside_gradients(result: dict[str, Any], arm: dict[str, Any]) -> float | None:
    """The larger of what the forward alone and what it takes with the backward, each besides what is there at its end.

    In the forward there is no gradient of the weight yet: the room for it in the second figure would hide a buffer.
    """
    spans = (("forward_peak_bytes", "forward_kept_bytes"), ("peak_bytes", "kept_bytes"))
    beside = [arm[peak] - arm.get(kept, result[kept]) for peak, kept in spans if peak in arm]
    return max(beside) / 2**20 if len(beside) == len(spans) else None


RULES = {
    "linear_kd_loss": _linear_rules,
    "kd_loss": _kd_rules,
    "mix_embeddings": _mix_rules,
    "relation_kl": _relation_rules,
}


def _against_forward(arms: dict[str, dict[str, Any]], backend: str) -> float | None:
    own, forward = _median(arms, backend), _median(arms, f"{backend}, forward_kl")
    return None if own is None or forward is None else own / forward


def _median(arms: dict[str, dict[str, Any]], name: str) -> float | None:
    time = arms.get(name, {}).get("time")
    return None if time is None else float(time["median_ms"])
