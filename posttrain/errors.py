"""The two ways a command can end badly, and their exit codes."""


class BadInput(Exception):
    """The user's recipe, data, path or argument is wrong. Exit code 2; nothing was started."""

    exit_code = 2


class RunFailed(Exception):
    """The work itself failed after it had started. Exit code 1; the run directory can be resumed."""

    exit_code = 1
