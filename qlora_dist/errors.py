"""The two ways a command ends early. Level 0: imports nothing of ours."""


class UserError(ValueError):
    """A mistake in what the user gave (config, data, paths). The command prints it as one paragraph and exits with 2.

    The text says what was found, what was expected, and what to do.
    """

    exit_code = 2


class RunFailed(RuntimeError):
    """The run itself went wrong (non-finite loss, disk full, a check that did not hold). Exit code 1.

    The text names the step and the cause, and says what is still good on disk.
    """

    exit_code = 1
