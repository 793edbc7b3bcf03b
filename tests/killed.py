"""Run a script, and kill its last rank before a step of AdamWShampoo: python tests/killed.py STEP script.py ..."""

import os
import runpy
import signal
import sys
from itertools import count
from pathlib import Path

from shampoo import AdamWShampoo


def main(number, script, *_):
    step, taken = AdamWShampoo.step, count(1)

    def killed(optimizer, *arguments, **named):
        if next(taken) == int(number) and int(os.environ.get("RANK", 0)) == int(os.environ.get("WORLD_SIZE", 1)) - 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return step(optimizer, *arguments, **named)

    AdamWShampoo.step = killed
    sys.argv = sys.argv[2:]
    sys.path[0] = str(Path(script).parent)
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    main(*sys.argv[1:])
