"""Gradients under rules with weights against autograd through the surrogates of their papers, written out.

The surrogates are built as the papers build them: a rollout without gradient, then predictions at its latents, joined
so that values are the rollout's and gradients the surrogate's. Everything is in X = x / signal, which a chain of flow
matching (signal 1, level sigma) or DDIM (level noise / signal) moves by the difference of levels times the prediction.

Tolerance: fp32 networks, 1e-4 of the largest gradient, as for plain chains.
"""

import random

import pytest
import torch

from alignprop_fast.generate.sampler import DifferentiableSampler, Gate
from alignprop_fast.models.lora.adapters import add_lora
from alignprop_fast.planner import BlockOption, Plan
from alignprop_fast.sampling import draw_truncation
from alignprop_fast.sampling.surrogates import supports

STEPS, PROMPTS = 5, ["a cat", "a dog"]


class Rollout:
    """A chain without gradient of diffusers' parts: latents, predictions, signals and levels of every step."""

    def __init__(self, pipe, x):
        self.pipe = pipe
        pipe.scheduler.set_timesteps(STEPS)
        flow = "transformer" in pipe.components
        if flow:
            self.levels, self.signals = pipe.scheduler.sigmas.tolist(), [1.0] * (STEPS + 1)
            self.text = pipe.encode_prompt(PROMPTS, None, None, do_classifier_free_guidance=False)
        else:
            alphas = pipe.scheduler.alphas_cumprod[pipe.scheduler.timesteps].tolist()
            alphas.append(pipe.scheduler.final_alpha_cumprod.item())
            self.signals = [alpha**0.5 for alpha in alphas]
            self.levels = [((1 - alpha) / alpha) ** 0.5 for alpha in alphas]
            self.text = pipe.encode_prompt(PROMPTS, "cpu", 1, False)
        self.X, self.y = [x / self.signals[0]], []
        with torch.no_grad():
            for i in range(STEPS):
                self.y.append(self.predict(i, self.X[i]))
                self.X.append(self.X[i] + self.step(i, i + 1) * self.y[i])

    def step(self, i, j):
        return self.levels[j] - self.levels[i]

    def predict(self, i, X):
        x, t = X * self.signals[i], self.pipe.scheduler.timesteps[i]
        if "transformer" in self.pipe.components:
            return self.pipe.transformer(x, self.text[0], self.text[2], t.expand(len(x))).sample
        return self.pipe.unet(x, t, self.text[0]).sample

    def images(self, X):
        vae = self.pipe.vae
        x = X * self.signals[STEPS] / vae.config.scaling_factor + (vae.config.get("shift_factor") or 0.0)
        return (vae.decode(x).sample / 2 + 0.5).clamp(0, 1)


def joined(value, surrogate):
    return surrogate + (value - surrogate).detach()


def scaled(x, factor):
    return factor * x + (1 - factor) * x.detach()


def distance(a, b):
    return (a - b).abs().flatten(1).mean(1).detach()


def leapalign(rollout, steps, alpha):
    k, j = steps
    X_k, X_j, X_0 = rollout.X[k], rollout.X[j], rollout.X[STEPS]
    leap = X_k + rollout.step(k, j) * rollout.predict(k, X_k)
    there = joined(X_j, leap)
    end = there + rollout.step(j, STEPS) * rollout.predict(j, scaled(there, alpha))
    errors = (distance(leap, X_j) * rollout.signals[j], distance(end, X_0) * rollout.signals[STEPS])
    return joined(X_0, end), sum(error.clamp_min(0.1) for error in errors)


def composed(rollout, start, first, last, predictions):
    """From `start` at step `first` to step `last` by Euler steps with the given predictions, else the rollout's."""
    X = start
    for i in range(first, last):
        X = X + rollout.step(i, i + 1) * predictions.get(i, rollout.y[i])
    return X


def sparse(rollout, steps, _):
    rescale = rollout.step(0, STEPS) / sum(rollout.step(i, i + 1) for i in steps)
    predictions = {i: scaled(rollout.predict(i, rollout.X[i]), rescale) for i in steps}
    return joined(rollout.X[STEPS], composed(rollout, rollout.X[0], 0, STEPS, predictions)), 1.0


def bridge(rollout, steps, alpha, j):
    early = {i: rollout.predict(i, rollout.X[i]) for i in steps if i < j}
    there = joined(rollout.X[j], composed(rollout, rollout.X[0], 0, j, early))
    late = {i: rollout.predict(i, scaled(there, alpha) if i == j else rollout.X[i]) for i in steps if i >= j}
    return joined(rollout.X[STEPS], composed(rollout, there, j, STEPS, late)), 1.0


def quadrature(rollout, start, target, first):
    """The leap by the integral of the polynomial through the supports, and the supports' lengths."""
    points = supports(start, target)
    levels = torch.tensor([rollout.levels[i] for i in points], dtype=torch.float64)
    powers = torch.arange(len(points), dtype=torch.float64)
    ends = rollout.levels[target] ** (powers + 1) - rollout.levels[start] ** (powers + 1)
    lengths = torch.linalg.solve(levels[None] ** powers[:, None], ends / (powers + 1)).tolist()
    predictions = [first]
    for place, i in enumerate(points[1:]):
        opened = scaled(rollout.predict(i, rollout.X[i]), 0.25)
        predictions.append(opened if place == 0 else rollout.y[i])
    return sum(length * y for length, y in zip(lengths, predictions, strict=True))


def lagrange(rollout, alpha, k, j):
    X_k, X_j, X_0 = rollout.X[k], rollout.X[j], rollout.X[STEPS]
    leap = X_k + quadrature(rollout, k, j, rollout.predict(k, X_k))
    there = joined(X_j, leap)
    end = there + quadrature(rollout, j, STEPS, rollout.predict(j, scaled(there, alpha)))
    errors = (distance(leap, X_j) * rollout.signals[j], distance(end, X_0) * rollout.signals[STEPS])
    return joined(X_0, end), sum(error.clamp_min(0.2) for error in errors)


def surrogate(rule, rollout, cut):
    name, (*_, number) = rule.split(":")[0], rule.split(":")
    if name == "leapalign":
        return leapalign(rollout, cut.grad_steps, float(number))
    if name == "flowbp-sparse":
        return sparse(rollout, cut.grad_steps, None)
    if name == "flowbp-bridge":
        j = next(gate.step for gate in cut.gates if gate.input_scale)
        return bridge(rollout, cut.grad_steps, float(number), j)
    return lagrange(rollout, float(number), cut.leaps[0].start, cut.leaps[1].start)


@pytest.fixture(params=["tiny_sd", "tiny_sd3"])
def pipe(request):
    pipe = request.getfixturevalue(request.param)
    torch.manual_seed(3)
    for parameter in add_lora(pipe, 2, 2):
        torch.nn.init.normal_(parameter, std=0.3)
    return pipe


@pytest.mark.parametrize(
    ("rule", "kind", "seed"),
    [
        ("leapalign:0.4", "resident", 0),
        ("leapalign:0.3", "replayed", 1),
        ("flowbp-sparse:2:1", "mixed", 0),
        ("flowbp-bridge:3:0.2", "replayed", 0),
        ("flowbp-bridge:4:0.5", "mixed", 1),
        ("flowbp-lagrange:0.1", "resident", 0),
        ("flowbp-lagrange:0.5", "mixed", 2),
    ],
)
def test_gradients_equal_the_surrogate_written_out(pipe, rule, kind, seed):
    sampler = DifferentiableSampler(pipe, STEPS, 1.0, 0.0)
    cut = draw_truncation(rule, sampler.table, random.Random(seed))
    steps = cut.grad_steps
    resident = {"resident": steps, "replayed": (), "mixed": steps[-1:]}[kind]
    option = {"*": BlockOption.RECOMPUTE if kind == "mixed" else BlockOption.KEEP}
    replayed = tuple(i for i in steps if i not in resident)
    plan = Plan(STEPS, resident, replayed, (option,) * len(resident), option)
    shape = sampler.model.initial_latents(2, sampler.size, None, None).shape
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(7))
    trained = [parameter for parameter in sampler.model.denoiser.parameters() if parameter.requires_grad]

    ours = sampler(PROMPTS, latents=noise, truncation=cut, plan=plan)
    found = torch.autograd.grad(ours.square().flatten(1).mean(1).sum(), trained)

    with torch.no_grad():
        rollout = Rollout(pipe, noise)
    latents, errors = surrogate(rule, rollout, cut)
    plain = rollout.images(latents)
    wanted = torch.autograd.grad((plain.square().flatten(1).mean(1) / errors).sum(), trained)
    assert (ours - plain).abs().max() < 1e-5
    assert max(b.abs().max() for b in wanted) > 1e-5
    for a, b in zip(found, wanted, strict=True):  # SD3's last block drops the text, so adapters there get zeros
        assert (a - b).abs().max() <= 1e-4 * b.abs().max()


@pytest.mark.parametrize("step", [0, 2, STEPS - 1])
def test_a_renoised_step_equals_direct_align(pipe, step):
    """The picture noised to the step's level, one step on, and the known noise taken away again."""
    sampler = DifferentiableSampler(pipe, STEPS, 1.0, 0.0)
    sampler(PROMPTS, truncation="srpo", generator=torch.Generator().manual_seed(7))
    assert sampler.truncation.gates == () and len(sampler.truncation.renoise_steps) == 1
    clean, trained = sampler.latents.detach(), [p for p in sampler.model.denoiser.parameters() if p.requires_grad]
    ours = sampler.renoise(clean, PROMPTS, None, torch.Generator().manual_seed(8), step=step)
    found = torch.autograd.grad(ours.square().sum(), trained)

    with torch.no_grad():
        rollout = Rollout(pipe, clean)
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(8))
    flow = "transformer" in pipe.components
    weights = [1 - level for level in rollout.levels] if flow else [1.0] * (STEPS + 1)  # of the clean latents in X
    end = 0.0 if step == STEPS - 1 else rollout.levels[step + 1]
    X = weights[step] * clean + rollout.levels[step] * noise
    X = X + (end - rollout.levels[step]) * rollout.predict(step, X) - end * noise
    latents = X if end == 0 else X / weights[step + 1]
    plain = rollout.images(latents / rollout.signals[STEPS])
    wanted = torch.autograd.grad(plain.square().sum(), trained)
    assert (ours - plain).abs().max() < 1e-5 and max(b.abs().max() for b in wanted) > 1e-5
    for a, b in zip(found, wanted, strict=True):
        assert (a - b).abs().max() <= 1e-4 * b.abs().max()


def test_gates_can_be_given(tiny_sd):
    add_lora(tiny_sd, 2)
    sampler = DifferentiableSampler(tiny_sd, STEPS, 1.0, 0.0)
    sampler(PROMPTS, truncation=[Gate(3, 2.0, 0.5), Gate(1)])
    assert sampler.truncation.gates == (Gate(1), Gate(3, 2.0, 0.5)) and sampler.plan.replayed_steps == (1, 3)
    with pytest.raises(ValueError, match="once"):
        sampler(PROMPTS, truncation=[Gate(1), Gate(1)])
