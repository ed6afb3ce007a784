"""The installed command `mixkd-fast`: train, evaluate, compare, report, teach, store, select, plan, sweep, config."""

import sys
from collections.abc import Sequence
from importlib import import_module

_COMMANDS = {
    "train": ("mixkd_fast.train", "train a student (or a teacher) as a configuration says"),
    "evaluate": ("mixkd_fast.cli_evaluate", "score a saved model on a task"),
    "compare": ("mixkd_fast.compare", "put finished runs beside each other in a table"),
    "report": ("mixkd_fast.report", "write a run's report.html again"),
    "teach": ("mixkd_fast.cli_teach", "keep what a teacher says of a whole corpus in a store"),
    "store": ("mixkd_fast.cli_store", "show or verify such a store"),
    "select": ("mixkd_fast.cli_select", "write the rows that MiniPLM chooses by two models' scores"),
    "plan": ("mixkd_fast.cli_plan", "predict memory and speed before anything runs"),
    "sweep": ("mixkd_fast.cli_sweep", "run and rank many configurations"),
    "config": ("mixkd_fast.cli_config", "show, check or describe configurations"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Dispatch to the subcommand. Returns its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == ["--version"]:
        from mixkd_fast.version import __version__

        print(__version__)
        return 0
    if not arguments or arguments[0] not in _COMMANDS:
        lines = [f"  {name:<9} {text}" for name, (_, text) in _COMMANDS.items()]
        print("usage: mixkd-fast COMMAND [options]; COMMAND --help says more\n" + "\n".join(lines), file=sys.stderr)
        return 0 if arguments[:1] in (["-h"], ["--help"]) else 2
    module = import_module(_COMMANDS[arguments[0]][0])
    result: int = module.main(arguments[1:])
    return result


if __name__ == "__main__":
    sys.exit(main())
