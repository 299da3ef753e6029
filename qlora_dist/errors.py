"""How a command ends early, and errors as plain data for other ranks. Level 0: imports nothing from this package."""


class UserError(ValueError):
    """A mistake in what the user supplied (config, data, paths). Printed as one paragraph; exit code 2.

    The text states what was found, what was expected, and what to do.
    """

    exit_code = 2


class RunFailed(RuntimeError):
    """The run itself failed (non-finite loss, disk full, a failed check). Exit code 1.

    The text names the step and the cause, and what is still intact on disk.
    """

    exit_code = 1


def pack_error(error: BaseException) -> tuple[str, str]:
    """(kind, text) as plain data, from which another rank raises the same error, see `unpack_error`."""
    return "user" if isinstance(error, UserError) else "run", str(error) or repr(error)


def unpack_error(kind: str, text: str) -> UserError | RunFailed:
    """The error that `pack_error` packed; anything other than a UserError becomes a RunFailed."""
    return UserError(text) if kind == "user" else RunFailed(text)
