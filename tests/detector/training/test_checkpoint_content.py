"""What a checkpoint says of its images."""

import pytest

from detector.errors import InputError
from detector.training.checkpoint_content import bit_depth_of


@pytest.mark.parametrize("told", [float("inf"), float("nan"), 7, 17, 12.5, "12", None, [12]])
def test_a_bit_depth_that_is_none_is_refused(told: object) -> None:
    with pytest.raises(InputError, match=r"bit_depth .*: must be in 8\.\.16"):
        bit_depth_of({"datamodule_hyper_parameters": {"bit_depth": told}})


def test_bit_depth_of_a_checkpoint() -> None:
    assert bit_depth_of({"datamodule_hyper_parameters": {"bit_depth": 12}}) == 12
    assert bit_depth_of({}) == 16
