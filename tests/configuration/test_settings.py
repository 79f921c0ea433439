"""Values that follow from settings."""

import pytest
from conftest import make_config, run_stage, stage_of

from b2diffurl.configuration.settings import read_settings


def test_the_learning_rate_falls_evenly(overrides):
    """Over five stages from 2e-3 to a tenth of it by hand, and no further in stages beyond; 1 is constant, to the bit."""
    optimizer = read_settings(
        make_config(overrides, **{"train.learning_rate": 2e-3, "train.final_rate": 0.1})
    ).training.optimizer
    assert [optimizer.rate(index, 5) for index in range(7)] == pytest.approx(
        [2e-3, 1.55e-3, 1.1e-3, 6.5e-4, 2e-4, 2e-4, 2e-4], rel=1e-12
    )
    assert optimizer.rate(0, 1) == 2e-3
    constant = read_settings(make_config(overrides, **{"train.learning_rate": 1e-3})).training.optimizer
    assert {constant.rate(index, 7) for index in range(9)} == {1e-3}


def test_a_stage_trains_at_its_own_rate(stage_with, overrides, tmp_path):
    """AdamW's first step is as long as the learning rate: the last of two stages has half of the first one's."""
    settings = overrides | {"train.final_rate": 0.5}
    for index in range(2):
        run_stage(tmp_path, settings, index)
    assert [stage_of(tmp_path, index).manifest("train")["learning_rate"] for index in range(2)] == [1e-2, 5e-3]
