"""The command line's exit codes: 0 done; 1 a failure while running; 2 input that cannot be used, or a full disk; 130 Ctrl-C."""

from __future__ import annotations

import contextlib
import os
import sys
import traceback

from workers.last_words import KEY, out_of_space, say_last_words

BAD_INPUT = {
    "ConfigError", "KeysError", "TaskError", "TextError", "InspectError", "LinkRefused", "CheckpointError", "Diverged",
    "LaunchRefused", "LogError", "RewardsBroken",
}  # fmt: skip
"""Starting again cannot help: exit code 2."""
FAILURES = {
    "LinkError",
    "LaunchError",
    "MetricsError",
    "NonFiniteError",
    "Refused",
    "ScorerError",
    "OSError",
}
"""Known by name, for importing them here would load what most commands do not need. A subclass counts as its parent."""


def exit_code_of(error: Exception) -> int:
    """Says on stderr what happened; returns the exit code. A disk that is full is like bad input: it stays so until somebody acts."""
    names = {kind.__name__ for kind in type(error).__mro__}
    full = out_of_space(error)
    text = f"headrace: {error}"
    if full and "LaunchError" not in names:
        then = "" if KEY in os.environ else ", then continue with `headrace launch CONFIG --resume`"
        text += f"; free space there{then}"
    if hopeless := full or bool(names & BAD_INPUT):
        say_last_words(text)
    with contextlib.suppress(OSError):  # the same full disk may hold the log that this goes to
        if not names & (BAD_INPUT | FAILURES) or os.environ.get("HEADRACE_TRACEBACK"):
            traceback.print_exc()
        else:
            print(text, file=sys.stderr, flush=True)
    return 2 if hopeless else 1
