"""How the runner's commands end when they are interrupted."""

import signal
import sys
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
