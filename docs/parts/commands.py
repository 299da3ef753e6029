"""The commands and their options, from click, and the exit codes."""

from __future__ import annotations

import inspect

import click

from docs.parts.markdown import code, prose, table
from qlora_dist.commands import PIPE_CODE, cli
from qlora_dist.commands.supervise import MAX_ATTEMPTS, NO_PROGRESS_CODE, TERMINATED_CODE
from qlora_dist.errors import RunFailed, UserError


def commands() -> str:
    """A section for each command that is not hidden, by name."""
    parts = [_command(name, one) for name, one in sorted(cli.commands.items()) if not one.hidden]
    general = table(("option", "meaning"), [_option(one) for one in cli.params if isinstance(one, click.Option)])
    return "\n\n".join([*parts, f"## Options before the command\n\n{general}"])


def _command(name: str, command: click.Command) -> str:
    context = click.Context(command, info_name=f"qlora-dist {name}")
    text, _, example = inspect.cleandoc(command.help or "").partition("\b")
    parts = [f"## {name}", prose(text)]
    usage = " ".join([f"qlora-dist {name}", *command.collect_usage_pieces(context)])
    parts[1:1] = [f"```text\n{usage}\n```"]
    options = [one for one in command.params if isinstance(one, click.Option) and not one.hidden]
    if options:
        parts.append(table(("option", "meaning"), [_option(one) for one in options]))
    lines = [line.strip() for line in example.splitlines() if line.strip() and line.strip() != "Example:"]
    if lines:
        parts.append("\n".join(["```sh", *lines, "```"]))
    return "\n\n".join(parts)


def _option(option: click.Option) -> tuple[str, str]:
    names = ", ".join(option.opts) + "".join(f" / {name}" for name in option.secondary_opts)
    value = option.metavar or ("|".join(option.type.choices) if isinstance(option.type, click.Choice) else "")
    if not option.is_flag and not value:
        value = option.type.name.upper()
    default = option.default if option.show_default else None
    if option.is_flag and option.secondary_opts and option.show_default:
        default = option.opts[0] if option.default else option.secondary_opts[0]
    text = prose(option.help or "")
    if default is not None:
        text += f" Default: {code(str(default))}." if text else f"Default: {code(str(default))}."
    return code(f"{names} {value}".strip()), text


def exit_codes() -> str:
    rows = (
        (0, "done: the run is finished, or was already; it was stopped by a signal and has saved; the check passed"),
        (
            RunFailed.exit_code,
            "the run failed, and the message says at which step, why, and what is intact: a loss that is not finite, a "
            "rank that was lost, a check of the run, out of memory, a full disk; `verify`: a claim fails; `doctor`: "
            "training cannot run here; an internal error",
        ),
        (
            UserError.exit_code,
            "a mistake in the command line, config, data, model or paths; nothing was started, and the same command "
            "will fail again",
        ),
        (
            NO_PROGRESS_CODE,
            f"Slurm jobs: {MAX_ATTEMPTS} attempts in a row without a new checkpoint; the job is not requeued",
        ),
        (130, "interrupted by Ctrl-C outside of a run (a run saves and ends with 0)"),
        (PIPE_CODE, "nobody reads the output any more, as under `head`"),
        (
            TERMINATED_CODE,
            "Slurm jobs: the job was requeued at its time limit or preempted, or ended by `scancel`; the run is saved",
        ),
        ("128 + N", "`train --ranks` and `qlora-dist torchrun`: a rank was ended by signal N and could say nothing"),
    )
    return table(("code", "meaning"), [(code(str(number)), text) for number, text in rows])
