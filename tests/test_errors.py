"""How a command ends: which errors are the user's, the machine's or the run's, and text from outside in messages."""

import errno

import pytest

from qlora_dist.errors import (
    _LASTING,
    MachineFailed,
    RunFailed,
    UserError,
    explain_os_error,
    os_errors,
    pack_error,
    printable,
    shortened,
    unpack_error,
)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ESTALE, errno.ENOMEM, errno.EMFILE])
def test_a_fault_of_the_machine_may_pass_and_is_not_the_users_mistake(code):
    with (
        pytest.raises(MachineFailed, match=r"writing the metrics: .*/disk/file") as caught,
        os_errors("writing the metrics"),
    ):
        raise OSError(code, "reason", "/disk/file")
    assert caught.value.exit_code == 1


@pytest.mark.parametrize("code", sorted(_LASTING), ids=errno.errorcode.get)
def test_what_stays_wrong_until_it_is_changed_is_the_users_to_mend(code):
    error = explain_os_error("saving", OSError(code, "reason", "/disk/file"), kept="Checkpoints are intact")
    assert isinstance(error, UserError) and error.exit_code == 2
    assert "/disk/file" in str(error) and str(error).endswith("Checkpoints are intact")
    assert "again" not in str(error)  # it would fail in the same way


@pytest.mark.parametrize("code", sorted(_LASTING), ids=errno.errorcode.get)
def test_the_advice_is_to_change_something_where_the_same_command_would_fail_again(code):
    text = str(explain_os_error("saving", OSError(code, "reason", "/disk/file")))
    assert "the same command" not in text and text.startswith("saving: reason (/disk/file); "), text


@pytest.mark.parametrize(
    "error, kind",
    [
        (UserError("a"), UserError),
        (RunFailed("a"), RunFailed),
        (MachineFailed("a"), MachineFailed),
        (OSError(errno.EIO, "a"), MachineFailed),
        (MemoryError("a"), MachineFailed),
        (KeyError("a"), RunFailed),
    ],
)
def test_an_error_keeps_its_kind_and_text_on_other_ranks(error, kind):
    there = unpack_error(*pack_error(error))
    assert type(there) is kind and "a" in str(there)


def test_control_characters_and_overrides_are_shown_not_sent():
    assert printable("a\x1b]52;c;x\x07\u202eb\x9bc\ud83d") == "a\\x1b]52;c;x\\x07\\u202eb\\x9bc\\ud83d"
    assert printable("tab\tline\né 🙂 العربية") == "tab\tline\né 🙂 العربية"


def test_a_value_of_any_size_is_shown_shortly():
    bomb = ["x" * 1000] * 1000
    for _ in range(40):  # 1000 ** 40 characters in full
        bomb = [bomb] * 1000
    assert len(shortened(bomb)) < 250
    assert len(shortened({"a": "b" * 10**6})) < 250
    assert "digits" in shortened(10**6000)
    assert shortened({"a": 1}) == "{'a': 1}"
