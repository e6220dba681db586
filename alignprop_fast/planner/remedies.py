"""Remedies that would lower the least budget of a plan that needs too much memory."""

from alignprop_fast.planner.plan import Plan

_BY_KIND = {
    "weights": "a quantised base model",
    "optimizer": "an 8-bit optimizer",
    "latents": "a smaller batch or resolution, or fewer gradient steps",
    "images": "a smaller batch or resolution",
}
_BY_PHASE = {
    "decoder": "a tiled decode, a smaller batch or resolution",
    "reward": "a chunked reward, a smaller batch",
}
_SHARE = 0.15  # of the peak; smaller kinds of memory are not named


def remedies(leanest: Plan) -> list[str]:
    """Remedies for what is alive at the worst moment of the leanest plan, the most effective first."""
    worst = max(leanest.phases, key=lambda phase: leanest.phases[phase])
    activations = _BY_PHASE.get(worst, "a smaller batch or resolution")
    if _in_pieces(leanest, worst):
        activations = "a smaller batch or resolution"
    sizes: dict[str, int] = {}
    for name, size in leanest.kinds.items():
        if name in ("kept", "transient"):
            remedy = activations
        else:
            remedy = next((text for part, text in _BY_KIND.items() if part in name.lower()), "")
        sizes[remedy] = sizes.get(remedy, 0) + size
    sizes.pop("", None)
    ranked = sorted(sizes, key=lambda remedy: -sizes[remedy])
    return [remedy for remedy in ranked if sizes[remedy] >= _SHARE * leanest.peak_bytes] or ranked[:1]


def _in_pieces(leanest: Plan, phase: str) -> bool:
    """Whether the plan already tiles the decoder or chunks the reward, so that this is no remedy."""
    if phase == "decoder":
        return leanest.decoder.name == "bands"
    return phase == "reward" and leanest.reward is not None and leanest.reward.name.startswith("chunk")
