"""What is done before anything else if the process is the `sqs` command: importing takes seconds.

The handlers that are set here say one line and end the process. The command sets others as soon as it works on
something, see :mod:`sqs_pyro.cli`.
"""

import os
import signal
import sys
from pathlib import Path
from types import FrameType, TracebackType

from sqs_pyro.resources import shortage


def is_command() -> bool:
    """Return whether this process is `sqs` or `python -m sqs_pyro`, and not a program that imports us."""
    started = sys.argv[0] if sys.argv else ""
    if started == "-m":  # Python has not found the module yet: it imports its package first
        options = sys.orig_argv
        return "-m" in options and options[options.index("-m") + 1 :][:1] == ["sqs_pyro"]
    return Path(started).name == "sqs"


def _leave(number: int, frame: FrameType | None) -> None:
    # Past Python's buffers, which the interrupted code may be writing to.
    os.write(sys.stderr.fileno() if sys.stderr else 2, b"Interrupted.\n")
    os._exit(128 + number)  # no library that is being imported has anything to put in order


def leave_on_interruption() -> None:
    """End the process with one line on Ctrl-C or SIGTERM, unless they are ignored."""
    for number in (signal.SIGINT, signal.SIGTERM):
        # Others stay: ignored by who started us (nohup), or handled by who embeds us.
        if signal.getsignal(number) in (signal.default_int_handler, signal.SIG_DFL):
            signal.signal(number, _leave)


def one_line_without_memory() -> None:
    """Say in one line that there was too little memory even for importing; other errors keep their traceback."""
    ordinary = sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        said = shortage(error)
        if said is None:
            ordinary(kind, error, trace)
            return
        # No print: without memory it may fail, too.
        os.write(2, f"error: This command needs more {said}: close other programs, or raise the limit.\n".encode())
        os._exit(2)

    sys.excepthook = hook


if is_command():
    leave_on_interruption()
    one_line_without_memory()
