"""The published parameter counts, to the digit."""

from __future__ import annotations

import pytest

from autosam3d.models.parameters import count_parameters
from autosam3d.models.spec import AutoSamSpec


@pytest.mark.parametrize(
    ("num_outputs", "paper_counted", "tuned_full_tables"),
    [
        (16, 26_530_944, 26_601_856), (14, 26_524_032, 26_594_944),
        (6, 26_496_384, 26_567_296), (4, 26_489_472, 26_560_384),
    ],
)
def test_counts_of_the_paper(num_outputs: int, paper_counted: int, tuned_full_tables: int) -> None:
    report = count_parameters(AutoSamSpec(num_outputs=num_outputs))
    assert report.paper_counted == paper_counted
    assert report.tuned_full_tables == tuned_full_tables
    assert report.tuned == paper_counted + 24_576 + 11_520
    assert report.frozen_full_tables == 88_846_592
    assert report.total == report.tuned + report.frozen
    assert sum(report.parts.values()) == report.tuned


def test_parts_of_the_default() -> None:
    assert count_parameters(AutoSamSpec(num_outputs=16)).parts == {
        "depth_embed": 24_576, "depth_proj": 13_056, "adapters": 7_220_736, "norms": 36_864, "rel_pos_d": 11_520,
        "necks": 7_868_416, "prompt_generator": 4_255_232, "decoder": 7_136_640,
    }


@pytest.mark.parametrize(
    ("prompt_generator", "aggregation", "millions"),
    [(True, True, 26.52), (False, True, 22.27), (True, False, 15.31), (False, False, 11.06)],
)
def test_ablations_of_table_3(prompt_generator: bool, aggregation: bool, millions: float) -> None:
    spec = AutoSamSpec(num_outputs=14, prompt_generator=prompt_generator, aggregation=aggregation)
    assert round(count_parameters(spec).paper_counted / 1e6, 2) == millions


@pytest.mark.parametrize(
    ("switch", "fewer"),
    [
        ({"adapter_dim": 0}, 7_220_736),  # all adapters of the table of parts
        ({"depth_embed": False}, 24_576),
        ({"rel_pos_resize": "interp"}, 0), ({"fuse_stride": 1}, 0),  # other work with the same weights
    ],
)
def test_switches_beside_table_3(switch: dict, fewer: int) -> None:
    whole, without = (count_parameters(AutoSamSpec(num_outputs=14, **s)) for s in ({}, switch))
    assert whole.tuned - without.tuned == fewer


@pytest.mark.parametrize(("vit", "frozen_millions"), [("vit_l", 307), ("vit_h", 636)])
def test_larger_sams_count_too(vit: str, frozen_millions: int) -> None:
    report = count_parameters(AutoSamSpec(num_outputs=14, vit=vit))
    assert round(report.frozen / 1e6) == frozen_millions
    assert report.parts["prompt_generator"] == 4_255_232
