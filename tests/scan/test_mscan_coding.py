from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mscan_files import META, properties

from tinyonn_lib.scan import lognorm
from tinyonn_lib.scan.mscan import Writer
from tinyonn_lib.scan.statistics import Target


@given(st.floats(lognorm.LOW, lognorm.HIGH))
@properties
def test_the_bound_holds(value: float) -> None:
    found = float(lognorm.decode(lognorm.encode(np.array(value))))
    assert abs(found - value) <= 3.2e-4 * value


def test_the_bound_holds_over_18_decades() -> None:
    assert np.log10(lognorm.HIGH / lognorm.LOW) == pytest.approx(18)
    values = np.geomspace(lognorm.LOW, lognorm.HIGH, 1_000_003)
    codes = lognorm.encode(values)
    worst = np.max(np.abs(lognorm.decode(codes) - values) / values)
    assert 3.1e-4 < worst <= 3.2e-4
    assert (np.diff(codes.astype(int)) >= 0).all()
    every = np.arange(65536, dtype=np.uint16)
    np.testing.assert_array_equal(lognorm.encode(lognorm.decode(every)), every)


def test_the_ends_of_the_scale() -> None:
    found = lognorm.decode(lognorm.encode(np.array([0.0, -0.0, np.nan, 1e-300, lognorm.LOW, lognorm.HIGH])))
    np.testing.assert_array_equal(found, [0.0, 0.0, np.nan, lognorm.LOW, lognorm.LOW, lognorm.HIGH])
    for bad, why in ((np.inf, "infinite"), (-np.inf, "negative"), (-1e-300, "negative"), (1.001e8, r"above 1e\+08")):
        with pytest.raises(lognorm.Unstorable, match=why) as caught:
            lognorm.encode(np.array([[0.0, 1.0], [bad, np.nan]]))
        assert caught.value.index == (1, 0)


@pytest.mark.parametrize(("count", "steps"), [(25, 3000), (200, 400), (25, 40)])
def test_at_most_8_bytes_per_record(path: Path, count: int, steps: int) -> None:
    targets = [Target(f"model.layers.{n // 8}.part{n % 8}", "linear", 0, n // 8) for n in range(count)]
    draw = np.random.default_rng(0)
    scale = draw.normal(0, 3, (count, 2))
    with Writer(path, targets, META) as file:
        for step, tokens in enumerate(draw.integers(20, 512, steps)):
            values = np.exp(scale + draw.normal(0, 0.5, (count, 2)))
            file.write(step, step // 4, int(tokens), values, np.arange(count) % 3)
    assert path.stat().st_size / (count * steps) <= 8
