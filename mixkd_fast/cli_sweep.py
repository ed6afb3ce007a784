"""`mixkd-fast sweep --config FILE`: run a search over a configuration's fields and rank what comes of it."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from mixkd_fast import distributed
from mixkd_fast.compare import format_table
from mixkd_fast.errors import ConfigurationError, Interrupted, MixKDError
from mixkd_fast.sweep.execution import run_trials
from mixkd_fast.sweep.ranking import Ranking, rank, write_ranking
from mixkd_fast.sweep.sweep_page import write_page
from mixkd_fast.sweep.trials import Trial, plan_trials
from mixkd_fast.sweep_file import Sweep, load_sweep


def main(argv: Sequence[str] | None = None) -> int:
    """Run from command-line arguments. Returns 1 for an error or a failed trial, 128 + signal when stopped."""
    parser = argparse.ArgumentParser(prog="mixkd-fast sweep", description=__doc__)
    parser.add_argument("--config", required=True, metavar="FILE", help="sweep file (see docs/sweep.md)")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        dest="overrides",
        metavar="a.b.c=VALUE",
        help="override a field of the base configuration; repeatable",
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--report-only", action="store_true", help="rank what is there, run nothing")
    what.add_argument("--dry-run", action="store_true", help="check and list the trials, run nothing")
    options = parser.parse_args(argv)
    try:
        if distributed.is_launched():
            raise ConfigurationError("a sweep is started without a launcher; its field ranks starts one per trial")
        sweep = load_sweep(options.config)
        trials = plan_trials(sweep, options.overrides)
        if options.dry_run:
            _list(trials)
            return 0
        return _sweep(sweep, trials, not options.report_only)
    except (MixKDError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def _sweep(sweep: Sweep, trials: list[Trial], run: bool) -> int:
    stopped = None
    if run:
        try:
            run_trials(sweep, trials)
        except Interrupted as stop:
            stopped = stop
    folder = Path(sweep.output)
    if not folder.is_dir():
        raise ConfigurationError(f"output = {sweep.output!r} is not there: nothing has been run yet")
    ranking = rank(sweep, trials)
    write_ranking(ranking, folder)
    page = write_page(ranking, sweep, folder)
    print(format_table(*ranking.table()))
    print(f"report: {page.resolve()}")
    if stopped is not None:
        print(f"{stopped}\nThe same sweep command goes on.", file=sys.stderr)
        return stopped.exit_code
    return 1 if _say_failures(ranking) else 0


def _say_failures(ranking: Ranking) -> int:
    for result in ranking.results:
        for error in result.errors:
            print(f"trial {result.trial.number:03d} failed: {error.splitlines()[0]}", file=sys.stderr)
    return ranking.num_failed


def _list(trials: list[Trial]) -> None:
    for trial in trials:
        print(f"{trial.folder}  {trial.describe()}")
    print(f"{len(trials)} trials, {sum(len(trial.runs) for trial in trials)} runs")
