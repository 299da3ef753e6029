"""What a step launches, multiplies and allocates, counted by the null device, against formulas, bounds and the plan."""

from __future__ import annotations

import os

import pytest

from benchmarks.null.plan import GRID
from benchmarks.null.steps import Point, measure
from benchmarks.shapes import shape_of

pytestmark = [
    pytest.mark.null,
    pytest.mark.timeout(1500),
    pytest.mark.skipif("QLORA_DIST_NULL_PYTHON" not in os.environ, reason="needs a null CUDA device"),
]

# Launches of a decoder layer in one step, forward and backward, as counted. Lower them when they fall
MOST_LAUNCHES = {"none": 86, "full": 109}
DEPTHS = (2, 4)


@pytest.fixture(scope="module")
def counted(tmp_path_factory):
    """The last step of each number of layers and recompute level."""
    keys = [(layers, recompute) for layers in DEPTHS for recompute in MOST_LAUNCHES]
    points = [Point("1b", 512, recompute, layers=layers) for layers, recompute in keys]
    return dict(zip(keys, (one["steps"][-1] for one in measure(points, tmp_path_factory.mktemp("counted")))))


@pytest.mark.parametrize("recompute", MOST_LAUNCHES)
def test_a_layer_launches_no_more_kernels_than_before(counted, recompute):
    few, many = (counted[layers, recompute]["launches"] for layers in DEPTHS)
    per_layer = (many - few) / (DEPTHS[1] - DEPTHS[0])
    assert 50 < per_layer <= MOST_LAUNCHES[recompute]


@pytest.mark.parametrize("layers", DEPTHS)
@pytest.mark.parametrize("recompute", MOST_LAUNCHES)
def test_a_step_multiplies_exactly_what_the_formula_says(counted, layers, recompute):
    """Four FLOPs per frozen weight and token, six without the last of each recomputed layer, and the adapters' own."""
    step = counted[layers, recompute]
    expected = shape_of("1b", layers).product_flops(
        step["tokens"], step["labels"], rank=16, recomputed_layers=layers if recompute == "full" else 0
    )
    assert step["product_flops"] == expected


def test_the_plan_is_within_one_percent_of_the_allocators_peak(tmp_path):
    """The small part of the grid of benchmarks.null.plan."""
    points = [point for point in GRID if point.shape == "1b"]
    found = list(measure(points, tmp_path))
    assert len(found) == len(points) >= 5
    assert all(abs(one["plan_error"]) <= 0.01 for one in found), {one["name"]: one["plan_error"] for one in found}
    assert all(one["build_peak_bytes"] <= one["peak_bytes"] for one in found)
