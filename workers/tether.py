"""Run a command that ends when the process that started it ends, even by SIGKILL:

    python -I -S tether.py PARENT_PID COMMAND...

Linux keeps the death signal across exec, so the command needs no knowledge of this. It is a program of its own because
doing the same between fork and exec in a process with threads (`preexec_fn`) may deadlock.
"""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1


def die_with_parent(parent: int, death: signal.Signals) -> None:
    """Ask the kernel for `death` when the parent ends. Raises OSError; ends this process if the parent is gone already."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_PDEATHSIG, int(death), 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    if os.getppid() != parent:
        sys.exit(f"headrace: the process that started this one ({parent}) is gone")


if __name__ == "__main__":
    die_with_parent(int(sys.argv[1]), signal.SIGTERM)
    os.execvp(sys.argv[2], sys.argv[2:])
