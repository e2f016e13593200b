"""Run a command if this machine sees the launcher's folder of the run:

    python -I -S same_folder.py TOKEN_FILE TOKEN LAUNCHER_HOST DIRECTORY COMMAND...

TOKEN_FILE must hold TOKEN, and DIRECTORY must be there to run in: paths of a config are relative to it. Exit code 3 when
that is not so, with one line that names both machines. Standard library alone: what the run needs may be missing here.
"""

import os
import socket
import sys

KEY = "HEADRACE_LAST_WORDS"
"""A path in the launcher's /proc: on another machine it would be somebody else's."""


def main(file: str, token: str, launcher: str, directory: str, *command: str) -> None:
    here = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
    folder = os.path.dirname(file)
    try:
        with open(file, encoding="utf-8") as opened:
            found = opened.read()
    except OSError as error:
        found = error.strerror or "unreadable"
    if found != token:
        got = found if len(found) != len(token) else "another run's folder"
        sys.exit(_refusal(f"{here} does not see the folder of the run that {launcher} has at {folder} ({got})"))
    try:
        os.chdir(directory)
    except OSError as error:
        sys.exit(_refusal(f"{here} has no {directory} ({error.strerror}), in which {launcher} starts the roles"))
    os.environ.pop(KEY, None)
    if "SLURM_PROCID" in os.environ:  # one process a node; torchrun asks for its machine's place under this name
        os.environ["PET_NODE_RANK"] = os.environ["SLURM_PROCID"]
    if command:
        os.execvp(command[0], command)


def _refusal(text: str) -> int:
    print(
        f"headrace: {text}; the run's folder and the program must be on a file system that all nodes share", flush=True
    )
    return 3


if __name__ == "__main__":
    main(*sys.argv[1:])
