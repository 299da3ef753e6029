"""The rules of the tape, against those of autograd."""

from __future__ import annotations

import pytest

from qlora_dist.memory.tape import Tape


def test_a_tensor_lives_while_a_variable_or_an_operation_references_it():
    tape = Tape()
    x = tape.input(100)
    y = tape.op([x], 100)
    z = tape.op([y], 100, saves=[y])
    tape.drop(y)
    assert tape.saved.total == 200 and tape.peak.total == 200
    tape.drop(z)
    assert tape.saved.total == 100


@pytest.mark.parametrize(("branches", "expected"), [(1, 200), (2, 300)])
def test_gradients_of_one_tensor_are_added_in_place_unless_the_first_is_still_referenced(branches, expected):
    tape = Tape()
    x = tape.input(100)
    others = [tape.op([x], 100, saves=[x]) for _ in range(branches)]
    out = tape.op([x, *others], 100, shares=[x, *others])
    tape.drop(*others)
    out.is_owned = False
    tape.live.activations -= out.size
    assert tape.saved.total == 0
    # the gradient of `out` serves all of its terms: it cannot be added to while another branch waits for it
    assert tape.backward(out).gradients == expected
    assert tape.live.gradients == 100  # of x: passed to the caller
