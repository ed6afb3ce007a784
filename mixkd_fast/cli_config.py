"""`mixkd-fast config show|check|schema`: what a configuration means, whether it is right, and the JSON Schema."""

import argparse
import json
import sys
from collections.abc import Sequence
from typing import Any

from mixkd_fast.configuration import Config, batch_arithmetic, load_config
from mixkd_fast.data.tasks import resolve
from mixkd_fast.deepspeed_config import student_deepspeed_config
from mixkd_fast.errors import ConfigurationError
from mixkd_fast.section import Section
from mixkd_fast.sweep_file import Sweep


def json_schema(kind: type[Section] = Config) -> dict[str, Any]:
    """The JSON Schema (draft 2020-12) of a configuration file, or of a sweep file, as published in configs/."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **kind.model_json_schema()}


def check_config(config: Config, ranks: int = 1) -> None:
    """What can be known without data and models: the task and whether the method fits it, the batch arithmetic, the
    deepspeed section.

    Raises: ConfigurationError.
    """
    config.method.check_kind(resolve(config.task).kind)
    student_deepspeed_config(config, batch_arithmetic(config.training, ranks))


def main(argv: Sequence[str] | None = None) -> int:
    """Run from command-line arguments. Returns 1 if a checked configuration is wrong."""
    parser = argparse.ArgumentParser(prog="mixkd-fast config", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    show = commands.add_parser("show", help="print the whole configuration with every default")
    show.add_argument("--config", required=True, metavar="FILE")
    show.add_argument("--set", action="append", default=[], dest="overrides", metavar="a.b.c=VALUE")
    check = commands.add_parser("check", help="check files without running them")
    check.add_argument("files", nargs="+", metavar="FILE")
    check.add_argument("--set", action="append", default=[], dest="overrides", metavar="a.b.c=VALUE")
    check.add_argument("--ranks", type=int, default=1, help="processes the run will have (1)")
    schema = commands.add_parser("schema", help="print the JSON Schema for editors")
    schema.add_argument("--sweep", action="store_true", help="that of sweep files")
    options = parser.parse_args(argv)
    if options.command == "schema":
        print(json.dumps(json_schema(Sweep if options.sweep else Config), indent=2))
        return 0
    try:
        if options.command == "show":
            config = load_config(options.config, options.overrides)
            print(json.dumps(config.model_dump(mode="json", by_alias=True), indent=2))
            return 0
    except ConfigurationError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    wrong = 0
    for path in options.files:
        try:
            check_config(load_config(path, options.overrides), options.ranks)
            print(f"{path}: fine")
        except ConfigurationError as error:
            wrong += 1
            print(f"{path}: {error}", file=sys.stderr)
    return 1 if wrong else 0
