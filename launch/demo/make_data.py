"""Step 1 of 5: writes the demo's data files. No prompt of held_out.json is in train.json."""

from __future__ import annotations

import json
import random

from tasks import DATA_DIR, KNOWN_TASKS, NEW_TASK, samples

NUM_HELD_OUT = 200
NUM_NEW = 6000
NUM_KNOWN = 4000  # replayed during fine-tuning, so that the base keeps what it knows


def main() -> None:
    rng = random.Random(1)
    held_out = samples(NEW_TASK, NUM_HELD_OUT, rng)
    held_out_known = [record for task in KNOWN_TASKS for record in samples(task, NUM_HELD_OUT // len(KNOWN_TASKS), rng)]
    hidden = frozenset(record["input"] for record in held_out + held_out_known)
    train = samples(NEW_TASK, NUM_NEW, rng, without=hidden)
    for task in KNOWN_TASKS:
        train += samples(task, NUM_KNOWN // len(KNOWN_TASKS), rng, without=hidden)
    DATA_DIR.mkdir(parents=True, exist_ok=True)
    for name, records in (("train", train), ("held_out", held_out), ("held_out_known", held_out_known)):
        path = DATA_DIR / f"{name}.json"
        path.write_text(json.dumps(records, indent=0) + "\n", encoding="utf-8")
        print(f"{path}: {len(records):,} records")


if __name__ == "__main__":
    main()
