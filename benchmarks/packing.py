"""Packing: documents per second and fill of this package and of TRL, side by side in one run.

    python -m benchmarks.packing --out benchmarks/results/cpu/packing.json

Lengths are distributed like Alpaca's: many short documents, a long tail. Each round times, one after another,
- plan: lengths -> rows (what this package does before a run; tokens stay on disk),
- rows: the same, plus copying the tokens of all rows in order (what TRL's `pack_dataset` returns),
- trl: TRL's `pack_dataset(strategy="bfd")` of an in-memory dataset, one process, its default batches.
`trl` is needed only for the last (pip install trl); without it, `trl_version` in the file is null.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from qlora_dist.cluster import provenance
from qlora_dist.data.loader import balance_over_ranks, row_costs
from qlora_dist.data.packing import Rows, hashed_order, pack_best_fit


def alpaca_like_lengths(count: int, longest: int) -> np.ndarray:
    """Log-normal with a median of 100 tokens; mean about 127."""
    lengths = np.exp(np.random.default_rng(0).normal(4.6, 0.7, count))
    return np.clip(lengths, 8, longest).astype(np.int32)


def gather_rows(rows: Rows, lengths: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """Tokens of all rows, one after another."""
    starts = np.cumsum(lengths, dtype=np.int64) - lengths
    sizes = lengths[rows.documents].astype(np.int64)
    begins = np.cumsum(sizes) - sizes
    return tokens[np.repeat(starts[rows.documents] - begins, sizes) + np.arange(sizes.sum())]


def trl_rows(lengths: np.ndarray, tokens: np.ndarray, row_tokens: int) -> tuple[Callable[[], Any], str] | None:
    """The same work by TRL, and its version; None if it is not installed."""
    try:
        import trl
    except ImportError:
        return None
    import datasets
    import pyarrow

    datasets.disable_progress_bars()
    offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]).astype(np.int32)
    column = pyarrow.ListArray.from_arrays(pyarrow.array(offsets), pyarrow.array(tokens))
    dataset = datasets.Dataset(pyarrow.table({"input_ids": column}))
    options = {"keep_in_memory": True, "load_from_cache_file": False}
    return lambda: trl.pack_dataset(dataset, row_tokens, strategy="bfd", map_kwargs=options), trl.__version__


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    started = time.perf_counter()
    result = work()
    return time.perf_counter() - started, result


def measure(num_documents: int, row_tokens: int, rounds: int) -> dict[str, Any]:
    """All samples, interleaved, so that a slow moment of the machine affects all of them equally."""
    lengths = alpaca_like_lengths(num_documents, row_tokens)
    tokens = np.arange(lengths.sum(), dtype=np.int32)
    peer = trl_rows(lengths, tokens, row_tokens)
    samples: dict[str, list[float]] = {"plan": [], "rows": [], **({"trl": []} if peer else {})}
    shares: dict[str, float] = {}
    num_rows: dict[str, int] = {}
    for _ in range(rounds):
        seconds, rows = timed(lambda: pack_best_fit(lengths, row_tokens, 0))
        samples["plan"].append(seconds)
        num_rows["plan"], shares["plan"] = len(rows), rows.efficiency
        seconds, packed = timed(lambda: gather_rows(pack_best_fit(lengths, row_tokens, 0), lengths, tokens))
        assert len(packed) == len(tokens)
        samples["rows"].append(seconds)
        num_rows["rows"], shares["rows"] = len(rows), rows.efficiency
        if peer:
            seconds, packed = timed(peer[0])
            samples["trl"].append(seconds)
            num_rows["trl"] = len(packed)
            shares["trl"] = float(lengths.sum() / (len(packed) * row_tokens))
    medians = {name: statistics.median(values) for name, values in samples.items()}
    return {
        "num_documents": num_documents,
        "num_tokens": int(lengths.sum()),
        "row_tokens": row_tokens,
        "seconds": samples,
        "median_seconds": medians,
        "documents_per_second": {name: round(num_documents / value) for name, value in medians.items()},
        "efficiency": shares,
        "num_rows": num_rows,
        "trl_version": peer[1] if peer else None,
        "balance": measure_balance(rows, lengths),
    }


def measure_balance(rows: Rows, lengths: np.ndarray, num_steps: int = 50) -> list[dict[str, Any]]:
    """Spread of attention work (sum of squared lengths) over the ranks of a step: largest over smallest, minus 1."""
    squares = rows.sum_by_row(lengths.astype(np.int64) ** 2)
    costs = row_costs(rows, lengths)
    order = hashed_order(len(rows), 0, 0)
    results = []
    for world_size, rows_per_step in ((2, 16), (4, 64), (8, 128)):
        shared, dealt, seconds = [], [], []
        for step in range(min(num_steps, len(rows) // rows_per_step)):
            indices = order[step * rows_per_step : (step + 1) * rows_per_step]
            elapsed, shares = timed(partial(balance_over_ranks, costs[indices], world_size))
            seconds.append(elapsed)
            shared.append(_spread([squares[indices[share]].sum() for share in shares]))
            dealt.append(_spread([squares[indices[rank::world_size]].sum() for rank in range(world_size)]))
        results.append(
            {
                "world_size": world_size,
                "rows_per_step": rows_per_step,
                "median_attention_spread": statistics.median(shared),
                "max_attention_spread": max(shared),
                "median_attention_spread_dealt_in_order": statistics.median(dealt),
                "median_share_out_seconds": statistics.median(seconds),
            }
        )
    return results


def _spread(sums: list[Any]) -> float:
    return float(max(sums) / min(sums) - 1)


def cpu_name() -> str:
    """The processor's name as reported by the system."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, nargs="+", default=[100_000, 1_000_000])
    parser.add_argument("--row-tokens", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    result = {
        "benchmark": "packing",
        "command": "python -m benchmarks.packing "
        f"--documents {' '.join(map(str, arguments.documents))} --row-tokens {arguments.row_tokens} "
        f"--rounds {arguments.rounds}",
        "commit": provenance.commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "cpu": cpu_name(),
        "num_cpus": os.cpu_count(),
        "versions": {
            **provenance.versions(),
            "numpy": np.__version__,
            "pyarrow": metadata.version("pyarrow"),
        },
        "results": [measure(count, arguments.row_tokens, arguments.rounds) for count in arguments.documents],
    }
    text = json.dumps(result, indent=1)
    if arguments.out is not None:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
