"""The differentiable sampler and its plan."""
