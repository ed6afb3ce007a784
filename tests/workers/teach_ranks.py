"""One rank of `mixkd-fast teach`: in a folder of its own (apart), or of ranks whose rank 1 is lost at a shard (lost).

Arguments: "apart" or "lost", a folder, and those of the command.
"""

import os
import sys

from mixkd_fast import cli_teach, shared_folder
from mixkd_fast.offline import writing

case, folder, *arguments = sys.argv[1:]
rank = os.environ["RANK"]
if case == "apart":
    os.makedirs(f"{folder}/{rank}")
    os.chdir(f"{folder}/{rank}")
    shared_folder.PATIENCE_S = 0.2
elif rank == "1":

    def leave(*_: object) -> None:
        """End without a word, and with a status that the test does not take for a failure."""
        os._exit(0)

    writing.StoreWriter.write = leave
sys.exit(cli_teach.main(arguments))
