"""Plans of a chain of four steps."""

from alignprop_fast.planner import BlockOption, Plan, StageChoice

STEPS = 4
DECODERS = {
    "resident": StageChoice("batch", {"*": BlockOption.KEEP}),
    "replayed": StageChoice("image", {"*": BlockOption.KEEP}),
    "mixed": StageChoice("image", {"*": BlockOption.RECOMPUTE}),
}


def make_plan(kind, grad_steps):
    """Resident, replayed, or mixed (the last step resident, the others replayed) with every block recomputed."""
    resident = {"resident": grad_steps, "replayed": (), "mixed": grad_steps[-1:]}[kind]
    option = {"*": BlockOption.RECOMPUTE if kind == "mixed" else BlockOption.KEEP}
    replayed = tuple(i for i in grad_steps if i not in resident)
    return Plan(STEPS, resident, replayed, (option,) * len(resident), option, DECODERS[kind])
