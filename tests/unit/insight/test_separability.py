"""Measures of separability on clouds of points whose answers are known."""

from __future__ import annotations

import numpy as np
import pytest
from tests.unit.insight.made import chain, network, odd

from forwardpass.errors import InsightError
from forwardpass.insight.represent import layers_to_compare, said
from forwardpass.insight.separability import Separability, check_classes, fisher, measure, principal
from forwardpass.model import onnx_graph

RNG = np.random.default_rng(1)
CLASSES = np.repeat([0, 1, 2], 40)


def clouds(apart: float) -> np.ndarray:
    """Three clouds of 40 points in 6 places, `apart` from each other."""
    centres = np.eye(3, 6) * apart
    return np.asarray(centres[CLASSES] + RNG.standard_normal((120, 6)))


def test_clouds_far_apart_are_separable_and_one_cloud_is_not() -> None:
    far, near = measure("a1", clouds(30), CLASSES), measure("x", clouds(0), CLASSES)
    assert far.probe == 1.0 and 0 < far.probe_error < 0.03
    assert 0.1 < near.probe < 0.6  # one in three, give or take
    assert far.fisher > 20 > 1 > near.fisher
    assert far.silhouette > 0.8 > 0.1 > near.silhouette
    assert (far.tensor, far.places, far.points.shape) == ("a1", 6, (120, 2))


def test_the_probe_sees_no_row_that_it_is_asked_about() -> None:
    # Every row its own direction: whoever remembers is right, whoever must guess is not.
    memorable = np.eye(120) * 10
    assert measure("x", memorable, np.arange(120) % 2).probe < 0.7


def test_fishers_ratio_by_hand() -> None:
    rows = np.array([[0.0, 0], [2, 0], [10, 0], [12, 0]])
    # Means 1 and 11 around 6: 4 * 25; within: 4 * 1.
    assert fisher(rows, np.array([0, 0, 1, 1])) == pytest.approx(25)
    assert fisher(rows * 7, np.array([0, 0, 1, 1])) == pytest.approx(25)
    assert fisher(np.array([[1.0], [1.0], [2.0], [2.0]]), np.array([0, 0, 1, 1])) == float("inf")


def test_principal_components_are_the_directions_of_most_variance() -> None:
    spread = RNG.standard_normal((500, 4)) * [0.1, 9, 3, 0.1]
    points, shares = principal(spread + 100)
    assert shares[0] == pytest.approx(81 / 90, abs=0.02) and shares[1] == pytest.approx(9 / 90, abs=0.02)
    assert abs(np.corrcoef(points[:, 0], spread[:, 1])[0, 1]) > 0.999
    assert abs(np.corrcoef(points[:, 1], spread[:, 2])[0, 1]) > 0.99
    np.testing.assert_allclose(points.mean(axis=0), 0, atol=1e-9)


def test_one_place_has_one_component() -> None:
    points, shares = principal(np.array([[1.0], [2.0], [4.0]]))
    assert points.shape == (3, 2) and shares == (1.0, 0.0)
    assert not points[:, 1].any()


@pytest.mark.parametrize(
    ("classes", "problem"),
    [
        (np.zeros(9), r"shape \[9\]; expected \[10\]"),
        (np.zeros((10, 1)), r"shape \[10, 1\]; expected \[10\]"),
        (np.arange(10) / 4, "not whole numbers"),
        (np.zeros(10), "one class only"),
        (np.array([0] * 8 + [3] * 2), "class 3 has 2 rows; expected at least 5"),
    ],
)
def test_labels_that_do_not_fit(classes: np.ndarray, problem: str) -> None:
    with pytest.raises(InsightError, match=problem):
        check_classes(classes, 10)


def test_labels_may_be_whole_floats() -> None:
    assert check_classes(np.array([0.0] * 5 + [1.0] * 5), 10).dtype == np.int64


def test_which_tensors_are_compared() -> None:
    assert layers_to_compare(onnx_graph.build(chain(4, 8, 8, 3), 2)) == {"x": "x", "g1": "a1", "g2": "a2", "y": "z3"}
    # The input as the first layer takes it; the last layer before its softmax.
    compared = layers_to_compare(onnx_graph.build(odd(), 2))
    assert (next(iter(compared.items())), list(compared)[-1]) == (("centred", "a0"), "raw")
    with pytest.raises(InsightError, match="2 inputs"):
        from onnx import helper

        layers_to_compare(
            onnx_graph.build(network([helper.make_node("Add", ["x", "w"], ["y"])], {}, inputs=("x", "w")), 2)
        )


def accuracy(tensor: str, value: float) -> Separability:
    return Separability(tensor, 4, value, 0.01, 1.0, 0.0, np.zeros((3, 2)), (1.0, 0.0))


def test_what_is_said_follows_the_numbers() -> None:
    rising = said([accuracy("x", 0.8), accuracy("a1", 0.9), accuracy("z2", 0.95)])
    assert "rises from 80.0% (x) to 95.0% (z2): +15.0 points, standard error 1.4" in rising
    assert rising.endswith("it falls at no layer")
    mixed = said([accuracy("x", 0.8), accuracy("a1", 0.95), accuracy("z2", 0.9)])
    assert "rises" in mixed and mixed.endswith("it falls at z2 (-5.0 points), and is best at a1 (95.0%)")
    assert "falls from 90.0% (x) to 80.0% (z1)" in said([accuracy("x", 0.9), accuracy("z1", 0.8)])
    assert "stays from 90.0%" in said([accuracy("x", 0.9), accuracy("z1", 0.9)])
