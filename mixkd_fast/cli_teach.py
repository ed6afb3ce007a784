"""`mixkd-fast teach`: write what a teacher says of the training rows into a store that later runs read."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from mixkd_fast import distributed
from mixkd_fast.configuration import load_config
from mixkd_fast.errors import MixKDError
from mixkd_fast.offline.manifest import KINDS
from mixkd_fast.teaching import TeachOptions, teach


def main(argv: Sequence[str] | None = None) -> int:
    """Run from command-line arguments, in one process or on every rank of a launcher. Returns 1 for an error."""
    parser = argparse.ArgumentParser(prog="mixkd-fast teach", description=__doc__)
    parser.add_argument("--config", required=True, metavar="FILE", help="configuration of a causal_lm run")
    parser.add_argument("--kind", required=True, choices=KINDS, help="what is kept of every target (see docs)")
    parser.add_argument("--output", required=True, metavar="DIR", help="the store's folder")
    parser.add_argument("--model", metavar="NAME", help="the model that is asked, in the place of teacher.model")
    parser.add_argument("--k", type=int, default=64, help="top_k: classes that are kept (64)")
    parser.add_argument("--temperature", type=float, default=1.0, help="top_k: of the log-probabilities (1)")
    parser.add_argument("--dtype", choices=["fp32", "bf16", "fp16"], help="top_k: fp16 or fp32; hidden: any (bf16)")
    parser.add_argument("--shard-mib", type=float, default=256.0, metavar="MIB", help="size of a shard (256)")
    parser.add_argument("--set", action="append", default=[], dest="overrides", metavar="a.b.c=VALUE")
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)  # DeepSpeed's launcher
    options = parser.parse_args(argv)
    wanted = TeachOptions(
        options.kind, Path(options.output), options.k, options.temperature, options.dtype, options.shard_mib
    )
    try:
        overrides = list(options.overrides)
        if options.model is not None:
            overrides.append(f"teacher.model={options.model}")
        taught = teach(load_config(options.config, overrides), wanted)
        if distributed.rank() == 0:
            print(taught.describe())
    except MixKDError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
