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


def pack_error(error: BaseException) -> tuple[str, str]:
    """(kind, text): plain data with which another rank raises the same, see `unpack_error`."""
    return "user" if isinstance(error, UserError) else "run", str(error) or repr(error)


def unpack_error(kind: str, text: str) -> UserError | RunFailed:
    """What `pack_error` packed; anything but a UserError as a RunFailed."""
    return UserError(text) if kind == "user" else RunFailed(text)
