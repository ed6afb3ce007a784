"""What of the quality benchmark is missing, and how long that takes by the runs already made."""

from collections import defaultdict
from collections.abc import Iterable

from benchmarks.quality_results import TEACHER, Options, Run, finished, in_order, whole, why_not
from benchmarks.quality_settings import ARMS, SETTINGS, exists, method_of

_TEACHER_LAYERS = 6
"""Of the default encoder."""


def plan_text(planned: list[Run], options: Options) -> str:
    """One line per part: its runs, how many are made, and an estimate for the others, for one process."""
    asked = {run: finished(run, options) for run in planned}
    # A model that a missing run needs must be there; the results of others are enough.
    needed = [other for run in planned if asked[run] is None for other in in_order(run, options)[:-1]]
    results = asked | {run: whole(run, options) for run in needed}
    runs = sorted(results, key=lambda run: (list(SETTINGS).index(run.setting), -run.layers))
    made = {run: result["seconds"] for run, result in results.items() if result is not None}
    missing = [run for run in runs if run not in made]
    seconds = {run: estimate(run, made) for run in missing}
    parts: dict[tuple[str, int], list[Run]] = defaultdict(list)
    for run in runs:
        parts[run.setting, run.layers].append(run)
    lines = [f"{'setting':<12} {'layers':<8} {'runs':>5} {'made':>5} {'h taken':>8} {'h to come':>10}"]
    for (setting, layers), members in parts.items():
        taken = sum(made[run] for run in members if run in made)
        to_come = _total(seconds[run] for run in members if run in seconds)
        layers_text = str(layers) if layers else TEACHER
        num_made = sum(run in made for run in members)
        lines.append(
            f"{setting:<12} {layers_text:<8} {len(members):>5} {num_made:>5} {taken / 3600:>8.2f} {to_come:>10}"
        )
    lines.append(
        f"{'all':<21} {len(runs):>5} {len(made):>5} {sum(made.values()) / 3600:>8.2f} {_total(seconds.values()):>10}"
    )
    if any(value is None for value in seconds.values()):
        lines.append("unknown: no run is made yet whose time could be scaled; make one, such as --arms ft --seeds 0")
    lines += [""] + [f"{run}: {why_not(run, options)}" for run in missing]
    return "\n".join(lines)


def estimate(run: Run, made: dict[Run, float]) -> float | None:
    """Seconds that a run will take: those of its like, else those of other runs in proportion to the work."""
    alike = [made[other] for other in made if _kind(other) == _kind(run)]
    if alike:
        return sum(alike) / len(alike)
    near = [other for other in made if other.setting == run.setting and other.arm != TEACHER] or list(made)
    work = sum(_work(other) for other in near)
    return sum(made[other] for other in near) / work * _work(run) if work else None


def _kind(run: Run) -> tuple[str, str, int]:
    return run.setting, run.arm, run.layers


def _work(run: Run) -> float:
    """Tokens x layers, a backward counted as two forwards. An arm whose method does not exist counts as KD."""
    setting = SETTINGS[run.setting]
    if run.arm == TEACHER:
        return setting.rows * setting.mean_tokens * setting.teacher_epochs * 3 * _TEACHER_LAYERS
    arm = ARMS[run.arm]
    method = method_of(run.arm if exists(run.arm) else "kd")
    epochs, mixes = setting.epochs * arm.passes, arm.mixes
    # The teacher's logits of the clean rows are computed once for all runs of a setting; of mixed rows, in every step.
    teacher = epochs if getattr(method, "tmkd_weight", 0.0) else 0.0
    return setting.rows * setting.mean_tokens * (epochs * (1 + mixes) * 3 * run.layers + teacher * _TEACHER_LAYERS)


def _total(seconds: Iterable[float | None]) -> str:
    values = list(seconds)
    known = [value for value in values if value is not None]
    return f"{sum(known) / 3600:.2f}" if len(known) == len(values) else "unknown"
