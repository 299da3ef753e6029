"""docs/support.md says what the proofs say: of every family of this transformers, without a failure, and still true."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import transformers
from support.configs import families
from support.proofs import PROOFS, STRATEGIES
from support.rows import refusal, row_of

from docs.parts.support import PROOFS as DESCRIBED
from docs.parts.support import results

ROWS: dict[str, Any] = results()["families"]
IN_PROCESS = [name for name in PROOFS if name not in STRATEGIES]
# of each kind, and of what is particular: latent attention, fp32 corrections, shared keys, a stand-in, Conv1D
SAMPLE = ("deepseek_v3", "gpt2", "glm4_moe", "gemma4_text", "qwen2_vl", "llama")
same_version = pytest.mark.skipif(
    transformers.__version__ != results()["transformers"], reason="computed with another transformers: make support"
)


@same_version
def test_every_family_of_this_transformers_is_there() -> None:
    assert sorted(ROWS) == families()
    assert len(families()) > 200


def test_every_accepted_family_has_every_proof_and_none_has_failed() -> None:
    assert list(DESCRIBED) == list(PROOFS)
    accepted = {family: row["cells"] for family, row in ROWS.items() if "cells" in row}
    assert len(accepted) > 60
    for family, cells in accepted.items():
        assert cells.keys() == PROOFS.keys(), family
        for proof, cell in cells.items():
            assert cell == "yes" or cell.startswith("no: "), f"{family}, {proof}: {cell}"


def test_a_refusal_is_in_words_for_the_user() -> None:
    for family, row in ROWS.items():
        reason = row.get("refused")
        assert reason is None or ("FAILED" not in reason and "/tmp" not in reason and len(reason) > 30), family


@same_version
@pytest.mark.parametrize("family", SAMPLE)
def test_a_sample_of_rows_is_what_the_proofs_give_now(family: str) -> None:
    row = row_of(family, IN_PROCESS[:5])
    assert row == {
        "kind": ROWS[family]["kind"],
        "cells": {name: ROWS[family]["cells"][name] for name in IN_PROCESS[:5]},
    }


@same_version
@pytest.mark.parametrize("family", ["bert", "bloom", "whisper", "qwen3_omni_moe", "llama4"])
def test_a_sample_of_refusals_is_what_the_program_says_now(family: str, tmp_path: Path) -> None:
    assert refusal(family, tmp_path) == ROWS[family]["refused"]


def test_a_proof_that_does_not_hold_is_a_failure_and_a_refusal_a_no(monkeypatch: pytest.MonkeyPatch) -> None:
    from qlora_dist.errors import UserError

    def wrong(_: Any) -> None:
        raise AssertionError("a logit differs by 1")

    def refused(_: Any) -> None:
        raise UserError("not here")

    monkeypatch.setitem(PROOFS, "plan", wrong)
    monkeypatch.setitem(PROOFS, "NF4", refused)
    assert row_of("llama", ["plan", "NF4"])["cells"] == {"plan": "FAILED: a logit differs by 1", "NF4": "no: not here"}
