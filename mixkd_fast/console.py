"""What a person sees while a run goes on: a start-up summary and one progress bar, on rank 0."""

import sys

from tqdm import tqdm

from mixkd_fast import distributed


def print_summary(title: str, facts: dict[str, str]) -> None:
    """Print aligned `name  value` lines under a title, on rank 0."""
    width = max(len(name) for name in facts)
    lines = [title] + [f"  {name:<{width}}  {value}" for name, value in facts.items()]
    distributed.say("\n".join(lines))


class Progress:
    """The bar: loss and its parts, the last metric, samples/s, tokens/s, time left."""

    def __init__(self, total_steps: int, first_step: int, enabled: bool, unit: str = "step") -> None:
        self._bar = tqdm(
            total=total_steps,
            initial=first_step,
            disable=not enabled or distributed.rank() != 0,
            file=sys.stderr,
            dynamic_ncols=True,
            unit=unit,
            mininterval=0.5 if sys.stderr.isatty() else 10.0,
        )
        self._metric = ""

    def step(
        self, loss: float, terms: dict[str, float], samples_per_s: float, tokens_per_s: float, num_steps: int = 1
    ) -> None:
        """Advance by the optimizer steps since the last call; loss and terms are those of the last one."""
        parts = " ".join(f"{name} {value:.3f}" for name, value in terms.items()) if len(terms) > 1 else ""
        speed = f"{samples_per_s:.0f} samples/s {tokens_per_s:.0f} tokens/s"
        shown = [f"loss {loss:.4f}" + (f" ({parts})" if parts else ""), self._metric, speed]
        self._bar.set_postfix_str(", ".join(part for part in shown if part), refresh=False)
        self._bar.update(num_steps)

    def advance(self) -> None:
        """One more, with nothing to say."""
        self._bar.update(1)

    def evaluated(self, step: int, split: str, metrics: dict[str, float]) -> None:
        """Print one evaluation above the bar and remember its first metric."""
        name, value = next(iter(metrics.items()))
        self._metric = f"{name} {value:.4f}"
        shown = "  ".join(f"{key} {number:.4f}" for key, number in metrics.items())
        distributed.say(f"step {step} {split}: {shown}")

    def close(self) -> None:
        """Finish the bar's line."""
        self._bar.close()


def human_count(number: float) -> str:
    """12,345,678 -> 12.3 M."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.1f} {unit}"
    return f"{number:.0f}"
