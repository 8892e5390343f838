"""Runs a command that dies with its parent: `python tether.py PARENT_PID COMMAND [ARGUMENT...]`.

The kernel kills the command when the process PARENT_PID ends, however it ends, SIGKILL included:
the setting outlives the exec below. It is set here, in a process of its own, because code between
fork and exec (`preexec_fn`) is unsafe in a parent with threads. This file is run by its path and
imports the standard library only, so that it costs some ten milliseconds.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1  # linux/prctl.h


def main() -> None:
    parent, command = int(sys.argv[1]), sys.argv[2:]
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before the setting above could see it
        sys.exit("the starting process has ended")
    os.execvp(command[0], command)


if __name__ == "__main__":
    main()
