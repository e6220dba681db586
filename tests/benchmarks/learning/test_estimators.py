"""Figures of an estimator from its draws: known gradients, and one real chain."""

import math

import pytest
import torch

from benchmarks.learning.chains import Setting
from benchmarks.learning.estimators import Chain, compare


def test_figures_of_known_gradients():
    """Draws around 2 (3, 4) with a deviation of 1 in each of 2 directions; tolerances: four standard errors."""
    noise = torch.randn(4000, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = compare(torch.tensor([6.0, 8.0]).double() + noise[:500], torch.tensor([3.0, 4.0]).double())
    assert found["norm_ratio"] == pytest.approx(2, abs=4 * found["norm_ratio_error"])
    assert found["norm_ratio_error"] == pytest.approx(1 / 5 / 500**0.5, rel=0.2)
    assert found["cosine"] == pytest.approx(1, abs=1e-3) and found["noise"] == pytest.approx(2**0.5 / 10, rel=0.1)


def test_one_draw_has_no_noise():
    found = compare(torch.tensor([[0.0, 2.0]]), torch.tensor([1.0, 0.0]))
    assert found["cosine"] == 0 and found["norm_ratio"] == 2 and found["noise"] == 0


def test_a_gradient_that_the_noise_hides_has_no_cosine():
    found = compare(torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0]]), torch.tensor([1.0, 0.0]))
    assert math.isnan(found["cosine"]) and math.isnan(found["norm_ratio"])


@pytest.mark.slow("chains of the bundled model, forward and back, twenty times")
@pytest.mark.parametrize("setting", [Setting("demo", 2, 1.0), Setting("demo", 2, 3.0, flow=True)], ids=["ddim", "flow"])
def test_figures_of_a_real_chain(setting):
    chain = Chain(setting, "clip", pictures=1, seed=0)
    full, last, sparse, srpo = (chain.row(rule, 3) for rule in ("full", "last:1", "flowbp-sparse:2", "srpo"))
    assert full["cosine"] == pytest.approx(1) and full["norm_ratio"] == pytest.approx(1) and full["draws"] == 1
    assert last["norm_ratio"] > 0 and last["forward"] == 3 and last["backward"] == 1
    assert sparse["cosine"] > 0 and srpo["reward_queries"] == 2 and srpo["forward"] == 3
