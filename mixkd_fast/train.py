"""`deepspeed mixkd_fast/train.py --config FILE` and `python -m mixkd_fast.train --config FILE`."""

import argparse
import os
import sys
from collections.abc import Sequence


def parser(program: str | None = None) -> argparse.ArgumentParser:
    """The options of training."""
    result = argparse.ArgumentParser(prog=program, description="Distil a student from a teacher as a JSON file says.")
    result.add_argument("--config", required=True, metavar="FILE", help="configuration (see configs/)")
    result.add_argument(
        "--set",
        action="append",
        default=[],
        dest="overrides",
        metavar="a.b.c=VALUE",
        help="override a field; repeatable",
    )
    result.add_argument("--resume", action="store_true", help="go on from the newest checkpoint of output.directory")
    result.add_argument(
        "--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS
    )  # DeepSpeed's launcher adds it
    return result


def main(argv: Sequence[str] | None = None, program: str | None = None) -> int:
    """Run from command-line arguments. Returns the exit code: 0, 1 for an error, 128 + signal when stopped."""
    options = parser(program).parse_args(argv)

    from mixkd_fast.errors import Interrupted, MixKDError

    try:
        from mixkd_fast.configuration import load_config
        from mixkd_fast.distillation import run_config

        run_config(load_config(options.config, options.overrides), resume=options.resume)
    except Interrupted as stop:
        print(stop, file=sys.stderr)
        return stop.exit_code
    except MixKDError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    # As a script, Python puts this file's folder first on the path; what must be found there is the package.
    here = os.path.dirname(os.path.abspath(__file__))
    sys.path[:] = [os.path.dirname(here), *(p for p in sys.path if os.path.abspath(p or ".") != here)]
    sys.exit(main())
