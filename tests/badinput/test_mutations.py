"""Files with a few wrong bytes are read or refused in words, whatever they say; tests/soak does it 2,000 times."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from mutations import Lived, mutated, try_checkpoints, try_niftis, try_recipes, try_series

pytestmark = pytest.mark.skipif(os.name != "posix", reason="POSIX alarms")


@pytest.mark.parametrize(("try_all", "count"), [
    (try_niftis, 60), (try_series, 12), (try_recipes, 12), (try_checkpoints, 20),
], ids=["nifti", "dicom", "recipe", "checkpoint"])
def test_a_few_wrong_bytes_are_read_or_refused_in_words(try_all: Callable[[Path, range], Lived], count: int,
                                                        tmp_path: Path) -> None:
    lived = try_all(tmp_path, range(count))
    assert lived.surprises == []
    assert lived.count == count and len(lived.refused) >= 2


def test_the_same_seed_is_the_same_accident() -> None:
    content = bytes(range(256)) * 4
    made = [mutated(content, np.random.default_rng(seed)) for seed in range(200)]
    assert made == [mutated(content, np.random.default_rng(seed)) for seed in range(200)]
    assert sum(one != content for one in made) > 150 and len(set(made)) > 150
