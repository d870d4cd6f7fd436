"""Names of learning rates against those that a reader would give."""

import pytest

from detector.training.callbacks.learning_rates import distinct_rates

NAMES = ("pretrained_weights", "pretrained_biases", "new_weights", "new_biases")


@pytest.mark.parametrize(
    ("factors", "expected"),
    [
        ((1, 1, 1, 1), {"all": 0.5}),
        ((1, 2, 1, 2), {"weights": 0.5, "biases": 1}),
        ((1, 1, 10, 10), {"pretrained": 0.5, "new": 5}),
        (
            (1, 2, 10, 20),
            {"pretrained_weights": 0.5, "pretrained_biases": 1, "new_weights": 5, "new_biases": 10},
        ),
        ((1, 2, 2, 4), {"pretrained_weights": 0.5, "new_weights+pretrained_biases": 1, "new_biases": 2}),
    ],
)
def test_each_schedule_once(factors, expected) -> None:
    groups = [{"name": n, "initial_lr": f, "lr": f / 2} for n, f in zip(NAMES, factors, strict=True)]
    assert distinct_rates(groups) == expected
    at_rest = distinct_rates([group | {"lr": 0.0} for group in groups])
    assert at_rest == dict.fromkeys(expected, 0.0)  # not one curve because all rates are 0 at the end


def test_of_some_groups_alone() -> None:
    """A network from scratch with everything new, and without a schedule."""
    groups = [{"name": "new_weights", "lr": 0.1}, {"name": "new_biases", "lr": 0.2}]
    assert distinct_rates(groups) == {"weights": 0.1, "biases": 0.2}
