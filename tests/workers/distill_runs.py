"""Several runs of the public `distill` in one launch.

Arguments: a JSON file with a list of its keyword arguments.
"""

import json
import sys
from pathlib import Path

from mixkd_fast import distill


def main() -> None:
    (path,) = [argument for argument in sys.argv[1:] if not argument.startswith("--local_rank")]
    for fields in json.loads(Path(path).read_text()):
        distill(**fields, progress=False)


if __name__ == "__main__":
    main()
