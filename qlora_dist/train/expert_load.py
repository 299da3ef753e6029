"""How evenly a mixture's router spreads tokens over its experts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

PATIENCE = 100  # steps
NAMED = 4  # experts in a message

Slots = Mapping[str, Sequence[int]]  # of each expert over all ranks, by the name of a layer's experts


def load_values(slots: Slots) -> dict[str, float]:
    """For metrics.jsonl: slots of the busiest expert over the mean, in the least even layer (1 is even); the number of
    experts without a token in all layers. Nothing for a model without stacked experts."""
    shares = [max(own) * len(own) / sum(own) for own in slots.values() if sum(own)]
    if not shares:
        return {}
    return {"expert_load": max(shares), "experts_without_tokens": sum(own.count(0) for own in slots.values())}


class IdleExperts:
    """Names each expert once that got no token in `patience` steps of this start, on any rank."""

    def __init__(self, patience: int | None = None) -> None:
        self._patience = PATIENCE if patience is None else patience
        self._idle: dict[tuple[str, int], int] = {}  # steps without a token until now
        self._named: set[tuple[str, int]] = set()

    def add(self, slots: Slots) -> str | None:
        """One step. Returns a warning about the experts that have just become too idle."""
        for name, own in slots.items():
            for index, number in enumerate(own):
                self._idle[name, index] = 0 if number else self._idle.get((name, index), 0) + 1
        found = [one for one, steps in self._idle.items() if steps >= self._patience and one not in self._named]
        if not found:
            return None
        self._named |= set(found)
        experts = ", ".join(f"{index} of {name}" for name, index in found[:NAMED])
        more = f" and {len(found) - NAMED:,} more" if len(found) > NAMED else ""
        return (
            f"no token was routed to expert {experts}{more} in {self._patience} steps: nothing of these experts is "
            "used or learned here. That is usual where the data are narrow; each is named once"
        )
