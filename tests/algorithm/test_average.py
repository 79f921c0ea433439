"""The exponential average: its figures by hand, and how old what it averages is."""

import pytest
import torch

from b2diffurl.algorithm.average import Average


def test_three_updates_by_hand():
    """Of decay 0.2 the first two updates are still warming up, at 1/10 and 2/11; the third would be at 3/12."""
    average = Average(0.2, {"A": torch.tensor([1.0, 2.0]), "B": torch.tensor([[0.0]])})
    for a, b in (([11.0, 2.0], 1.0), ([0.0, 2.0], 3.0), ([4.0, 2.0], 2.0)):
        average.add({"A": torch.tensor(a), "B": torch.tensor([[b]])})
    # A: 0.1 * 1 + 0.9 * 11 = 10; 2/11 * 10 + 9/11 * 0 = 20/11; 0.2 * 20/11 + 0.8 * 4 = 3.5636
    # B: 0.9; 2/11 * 0.9 + 9/11 * 3 = 2.61818; 0.2 * 2.61818 + 0.8 * 2 = 2.12364
    torch.testing.assert_close(average.tensors["A"], torch.tensor([3.563636, 2.0]))
    torch.testing.assert_close(average.tensors["B"], torch.tensor([[2.123636]]))
    assert average.tensors["A"][1] == 2.0  # what stays the same is not rounded
    assert average.num_updates == 3


@pytest.mark.parametrize(("decay", "age"), [(0.9999, 99.0), (0.9, 9.0)])
def test_its_mean_age_is_a_tenth_of_the_updates_at_most(decay, age):
    """After 1,000 updates, of which update n has the value n: warm-up limits the age to nearly 1000/10, or the decay to
    decay / (1 - decay). What training began with is forgotten."""
    average = Average(decay, {"A": torch.zeros(1, dtype=torch.float64), "begun": torch.ones(1, dtype=torch.float64)})
    for n in range(1, 1001):
        average.add({"A": torch.tensor([float(n)], dtype=torch.float64), "begun": torch.zeros(1, dtype=torch.float64)})
    assert 1000 - average.tensors["A"].item() == pytest.approx(age, rel=0.02)
    assert average.tensors["begun"].item() < 1e-15
