"""A small release of MMLU."""

from __future__ import annotations

from pathlib import Path

from qlora_dist.commands.evaluate.mmlu import LETTERS

SUBJECTS = ("high_school_physics", "law")


def write_mmlu(folder: Path, per_subject: int = 5) -> Path:
    for split, count in (("dev", 2), ("val", per_subject)):
        (folder / split).mkdir(parents=True)
        for subject in SUBJECTS:
            lines = [
                f'"What is {i}, {subject}?",one {i},two,three,four,{LETTERS[(i + len(subject)) % 4]}'
                for i in range(count)
            ]
            (folder / split / f"{subject}_{split}.csv").write_text("\n".join(lines) + "\n")
    return folder
