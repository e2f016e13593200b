"""Run a command that ends, with all the processes that it has started, when the process that started this one ends, even by
SIGKILL:

    python -I -S leash.py PARENT_PID COMMAND...

A death signal reaches only the process that asked for it, and a server has processes of its own. So this one stays: the
command gets a process group, all of which is killed when the command has ended, when the parent has, or on SIGTERM. It ends
with the command's exit code, 128 more than the signal's number if that was a signal.
"""

import ctypes
import os
import signal
import subprocess
import sys
from types import FrameType

PR_SET_PDEATHSIG = 1
ENDED = 128


def die_with(parent: int, death: signal.Signals) -> None:
    """Ask the kernel for `death` when `parent` ends. Raises OSError; ends this process if the parent is gone already."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_PDEATHSIG, int(death), 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    if os.getppid() != parent:
        sys.exit(f"headrace: the process that started this one ({parent}) is gone")


def kill_group(leader: int) -> None:
    try:
        os.killpg(leader, signal.SIGKILL)
    except ProcessLookupError:
        return


def main() -> int:
    leash = os.getpid()
    # No threads here, so code between fork and exec is safe. The command goes even if this process is killed first.
    command = subprocess.Popen(sys.argv[2:], process_group=0, preexec_fn=lambda: die_with(leash, signal.SIGKILL))

    def end(number: int, _frame: FrameType | None) -> None:
        kill_group(command.pid)
        sys.exit(ENDED + number)

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, end)
    try:
        die_with(int(sys.argv[1]), signal.SIGTERM)
        code = command.wait()
    finally:
        kill_group(command.pid)
    return code if code >= 0 else ENDED - code


if __name__ == "__main__":
    sys.exit(main())
