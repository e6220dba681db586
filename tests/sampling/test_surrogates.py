"""Gates of rules with weights against the formulas of their papers, on flow matching and on DDIM.

Tolerance: double precision, so 1e-9 of a weight.
"""

import random
from collections import Counter
from itertools import pairwise

import pytest

from alignprop_fast.sampling import Gate, Truncation, checked, ddim_table, draw_truncation, euler_table, gate_count
from alignprop_fast.sampling.coordinates import Coordinates
from alignprop_fast.sampling.draw import parse_rule
from alignprop_fast.sampling.surrogates import draw_late, supports

SIGMAS = [1.0, 0.93, 0.8, 0.75, 0.5, 0.4, 0.21, 0.1, 0.0]
FLOW = euler_table(SIGMAS, range(8), "flow")
ALPHAS = [0.95, 0.8, 0.6, 0.45, 0.3, 0.2, 0.1, 0.02]
DDIM = ddim_table(ALPHAS, 0.99, list(range(7, -1, -1)), 1, 0.0)
# The same chain in the variables of the papers: x / signal moves by the noise level times the predicted noise.
LEVELS = [((1 - alpha) / alpha) ** 0.5 for alpha in (*reversed(ALPHAS), 0.99)]
CHAINS = pytest.mark.parametrize(("table", "sigmas"), [(FLOW, SIGMAS), (DDIM, LEVELS)], ids=["flow", "ddim"])


def draws_of(rule, table, number=300):
    draws = random.Random(0)
    return [draw_truncation(rule, table, draws) for _ in range(number)]


@CHAINS
def test_leaps_have_the_weights_of_leapalign(table, sigmas):
    drawn = draws_of("leapalign:0.4", table, 600)
    for cut in drawn:
        (k, j), h = cut.grad_steps, [a - b for a, b in pairwise(sigmas)]
        first, second = cut.gates
        assert first.weight == pytest.approx((sigmas[k] - sigmas[j]) / h[k], rel=1e-9) and first.input_scale == 0
        assert second.weight == pytest.approx((sigmas[j] - sigmas[8]) / h[j], rel=1e-9) and second.input_scale == 0.4
        assert cut.least_error == 0.1 and [(leap.start, leap.target) for leap in cut.leaps] == [(k, j), (j, 8)]
    pairs = Counter(cut.grad_steps for cut in drawn)
    assert len(pairs) == 28 and max(pairs.values()) < 3 * 600 / 28  # all pairs, evenly: six standard deviations
    assert draw_truncation("leapalign", table).gates[1].input_scale == 0.3


@CHAINS
def test_lagrange_weights_integrate_polynomials_exactly(table, sigmas):
    """Predictions that are a polynomial of degree 2 in sigma: the quadrature of three points is their integral."""
    for cut in draws_of("flowbp-lagrange", table):
        for leap in cut.leaps:
            points = supports(leap.start, leap.target)
            degree = len(points) - 1
            moved = sum(factor * sigmas[i] ** degree for i, factor in leap.y_factors)
            lower, upper = sigmas[leap.start], sigmas[leap.target]
            signal = 1.0 if table is FLOW else (1 + upper**2) ** -0.5
            exact = (upper ** (degree + 1) - lower ** (degree + 1)) / (degree + 1)
            assert moved == pytest.approx(signal * exact, rel=1e-9)
            opened = [gate for gate in cut.gates if leap.start <= gate.step < leap.target]
            assert [gate.step for gate in opened] == points[:2]
            for place, gate in enumerate(opened):
                length = Coordinates(table).scales[leap.target] * Coordinates(table).lengths[gate.step]
                share = 1.0 if place == 0 else 0.25
                assert gate.weight == pytest.approx(share * dict(leap.y_factors)[gate.step] / length, rel=1e-9)
                assert gate.input_scale == (0.1 if place == 0 and leap.target == 8 else 0.0)


@CHAINS
def test_sparse_steps_stand_for_the_whole_path_if_rescaled(table, sigmas):
    for cut in draws_of("flowbp-sparse:3:1", table):
        opened = sum(sigmas[i] - sigmas[i + 1] for i in cut.grad_steps)
        assert len(cut.gates) == 3 and all(gate.input_scale == 0 for gate in cut.gates)
        assert cut.gates[0].weight == pytest.approx((sigmas[0] - sigmas[8]) / opened, rel=1e-9)
    assert all(gate.weight == 1 for cut in draws_of("flowbp-sparse:3", table) for gate in cut.gates)


def test_late_steps_are_drawn_more_often():
    draws = random.Random(0)
    first = Counter(draw_late(range(2, 6), 1, draws)[0] for _ in range(3000))
    for step, weight in zip(range(2, 6), (1, 4, 9, 16), strict=True):
        p = weight / 30
        assert abs(first[step] / 3000 - p) < 5 * (p * (1 - p) / 3000) ** 0.5  # five standard deviations
    assert draw_late(range(4), 4, draws) == (0, 1, 2, 3) and draw_late(range(4), 0, draws) == ()


@pytest.mark.parametrize("number", [2, 5, 8])
def test_a_bridge_is_open_on_both_sides_and_nested_at_j(number):
    seen = set()
    for cut in draws_of(f"flowbp-bridge:{number}:0.2", FLOW):
        nested = [gate.step for gate in cut.gates if gate.input_scale]
        assert len(nested) == 1 and cut.gates == checked(cut.gates, 8) and len(cut.gates) == number
        assert all(gate.weight == 1 and gate.input_scale in (0.0, 0.2) for gate in cut.gates)
        seen.add(nested[0])
        assert cut.grad_steps[0] < nested[0]
    assert seen == set(range(1, 8))


def test_discount():
    assert draw_truncation("discount:0.5", FLOW).gates == tuple(Gate(i, 0.5 ** (7 - i)) for i in range(8))


@pytest.mark.parametrize("rule", ["leapalign", "flowbp-sparse:3", "flowbp-bridge:4", "flowbp-lagrange", "discount:0.9"])
def test_the_number_of_open_steps_is_known(rule):
    counts = [len(cut.gates) for cut in draws_of(rule, FLOW, 1000)]
    most, mean = gate_count(rule, 8)
    assert max(counts) == most and abs(sum(counts) / 1000 - mean) < 4 * 0.8 / 1000**0.5


@pytest.mark.parametrize("rule", ["full", "last:2", "lv:3", "srpo", "srpo:3", "drtune", "refl", "leapalign"])
def test_what_a_rule_costs_beside_a_whole_chain(rule):
    """Of srpo, whose chain has no gate, one renoising stands for the chain's last step. 2,000 draws, four errors."""
    found = [(len(cut.renoise_steps) - (not cut.gates), cut.last_step) for cut in draws_of(rule, FLOW, 2000)]
    evaluations, chains, pictures = parse_rule(rule, 8).beside(8)
    left_out = [0 if last is None else last - 7 for _, last in found]
    assert all(chains == number for number, _ in found) and pictures == (rule[:4] == "srpo")
    assert evaluations == pytest.approx(sum(left_out) / 2000 + (rule[:4] == "srpo"), abs=4 * 1.0 / 2000**0.5)


def test_srpo_noises_to_the_levels_of_its_paper_and_never_to_pure_noise():
    assert {step for cut in draws_of("srpo:3", FLOW, 100) for step in cut.renoise_steps} == {1, 2, 3, 4}
    assert draws_of("srpo", euler_table([1.0, 0.5, 0.0], [999, 500], "flow"), 1)[0].renoise_steps == (1,)


@pytest.mark.parametrize(
    ("rule", "table", "said"),
    [
        ("srpo:0", FLOW, "srpo:1"),
        ("srpo", euler_table([1.0, 0.0], [0], "flow"), "last:1"),
        ("srpo", ddim_table(ALPHAS, 0.99, list(range(7, -1, -1)), 1, 1.0), "ddim with eta 0"),
        ("leapalign:-1", FLOW, "at least 0"),
        ("leapalign:nan", FLOW, "at least 0"),
        ("flowbp-sparse:9", FLOW, "use 1 to 8"),
        ("flowbp-sparse", FLOW, "flowbp-sparse:K"),
        ("flowbp-bridge:1", FLOW, "use 2 to 8"),
        ("leapalign", euler_table([1.0, 0.0], [0], "flow"), "last:1"),
        ("flowbp-lagrange", euler_table([1.0, 0.0], [0], "flow"), "last:1"),
        ("leapalign", ddim_table(ALPHAS, 0.99, list(range(7, -1, -1)), 1, 1.0), "ddim with eta 0"),
        ("discount:x", FLOW, "discount:GAMMA"),
        ("flowbp-lagrange", ddim_table(ALPHAS, ALPHAS[0], list(range(7, -1, -1)), 1, 0.0), "step 7 has none"),
    ],
)
def test_bad_rules_name_the_remedy(rule, table, said):
    with pytest.raises(ValueError, match=r"truncation|scheduler") as error:
        draw_truncation(rule, table)
    assert said in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("gates", "said"),
    [((Gate(8),), "outside"), ((Gate(1), Gate(1, 2.0)), "once"), ((Gate(1, float("nan")),), "not finite")],
)
def test_bad_gates_name_the_remedy(gates, said):
    with pytest.raises(ValueError, match=said):
        checked(gates, 8)
    assert checked((Gate(3), Gate(1)), 8) == Truncation.at((1, 3)).gates
