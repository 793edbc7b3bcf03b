"""How the runner's commands, and the processes that they start, end when they are interrupted."""

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable
from typing import Any

from absl import app


def run(main: Callable[[list[str]], Any]) -> None:
    """Run the main function of a command as `absl.app.run` does. Ctrl-C ends it with a message instead of a traceback."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:  # as this package's __init__.py sets it
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        app.run(main)
    except KeyboardInterrupt:
        sys.exit("error: interrupted; repeat the command to go on")


def end_with_parent() -> None:
    """End this process, without a message, at Ctrl-C and when its parent ends, even by SIGKILL."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
