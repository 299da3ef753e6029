"""Shared by all tests: nothing is fetched, nothing is written outside the test's own folder."""

import gc
import os
import sys
from pathlib import Path

gc.disable()  # until all is imported: see pytest_collection_finish
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
TESTS = Path(__file__).parent
sys.path.insert(0, str(TESTS))
# the fork server of helpers.ranks reads it: without it its preload finds nothing, and says nothing
from helpers.ranks import python_path, share_fork_server  # noqa: E402

os.environ["PYTHONPATH"] = python_path()
sys.dont_write_bytecode = True

import pytest  # noqa: E402
import torch  # noqa: E402  (after the environment is set)

pytest_plugins = ["helpers.workers"]

torch.set_num_threads(1)  # tiny tensors: a thread pool costs more than it gives

# The files that take longest: first the one that mostly waits, for Slurm. The many short ones then fill both workers to
# the end
LONGEST = (
    "test_slurm", "test_faults", "test_zero", "test_gpu_smoke", "test_train", "test_verify", "test_benchmarks",
    "test_hybrids", "test_mixtures", "test_stream_memory", "test_shard_training", "test_launchers", "test_traced_layer",
    "test_fit_memory", "test_kernels_compiled", "test_kernels_interpreted", "test_plan", "test_nodes_sharded",
    "test_sharded_use", "test_notebooks", "test_text_part", "test_resume", "test_checks", "test_checkpoint",
    "test_shard", "test_shard_gather", "test_gpu_queue", "test_data_report", "test_stream", "test_support",
)  # fmt: skip


def pytest_configure(config: pytest.Config) -> None:
    if config.option.workers and not config.option.collectonly:
        share_fork_server()  # it imports while this process collects


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Longest files first; within a file the order stays (tests share what its fixtures have built)."""
    items.sort(key=lambda item: LONGEST.index(item.path.stem) if item.path.stem in LONGEST else len(LONGEST))


def pytest_collection_finish() -> None:
    """What is imported by now stays: a run collects garbage twice, and would visit all of it each time."""
    gc.collect()
    gc.freeze()
    gc.enable()


@pytest.fixture(scope="module", autouse=True)
def _what_stays() -> None:
    """What the files before this one have imported stays too."""
    gc.collect()
    gc.freeze()
