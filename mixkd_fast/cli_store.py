"""`mixkd-fast store DIR`: what a teacher store holds; with --verify read it all, check it and say how fast that was."""

import argparse
import sys
from collections.abc import Sequence

from mixkd_fast.errors import MixKDError
from mixkd_fast.offline.reading import OfflineStore


def main(argv: Sequence[str] | None = None) -> int:
    """Run from command-line arguments. Returns 1 for a store that is damaged, unfinished or not there."""
    parser = argparse.ArgumentParser(prog="mixkd-fast store", description=__doc__)
    parser.add_argument("folder", metavar="DIR")
    parser.add_argument("--verify", action="store_true", help="read every row and check all checksums")
    options = parser.parse_args(argv)
    try:
        store = OfflineStore(options.folder, "DIR")
        for name, value in store.facts().items():
            print(f"{name:<16} {value:,.1f}" if isinstance(value, float) else f"{name:<16} {value}")
        if options.verify:
            print(f"{'reading':<16} {store.verify().describe()}")
    except MixKDError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
