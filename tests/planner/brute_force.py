"""Random cost tables, and every plan of such a table by a second walk through the training step, written apart from the
planner's."""

from itertools import product

import numpy as np

from alignprop_fast.planner import CostTable, GraphUse, Option, Segment, Stage


def random_segments(rng, prefix, count):
    def option(name):
        transient = rng.choice([0, rng.randint(0, 30), rng.randint(30, 90)])
        return Option(
            name, rng.randint(0, 40), transient, rng.randint(1, 24) / 8
        )  # sums of eighths are exact, so that ties are exact

    names = ["save", "qkv", "recompute"][: rng.choice([2, 2, 3])]
    return tuple(Segment(f"{prefix}.{k}", tuple(option(name) for name in names)) for k in range(count))


def random_stage(rng, prefix, name):
    replayed = rng.random() < 0.5
    return Stage(
        name,
        random_segments(rng, prefix, rng.choice([1, 1, 2])),
        runs=rng.randint(1, 3) if replayed else 1,
        replayed=replayed,
        forward_bytes=rng.randint(0, 60) if replayed else 0,
        forward_seconds=rng.randint(0, 8) / 8 if replayed else 0.0,
    )


def random_table(rng):
    return CostTable(
        fixed={"weights": rng.randint(0, 40), "optimizer": rng.randint(0, 10)},
        latent_bytes=rng.randint(1, 3),
        image_bytes=rng.randint(0, 5),
        step=random_segments(rng, "step", rng.choice([1, 2, 2, 3])),
        sampling_bytes=rng.choice([0, rng.randint(0, 40), rng.randint(0, 200)]),
        sampling_seconds=rng.randint(0, 8) / 8,
        decoders=tuple(random_stage(rng, "decoder", name) for name in ("batch", "image")[: rng.randint(1, 2)]),
        rewards=tuple(random_stage(rng, "reward", name) for name in ("batch", "chunk:1")[: rng.randint(0, 2)]),
        reserve_bytes=rng.randint(0, 30),
        sums_bytes=rng.choice([0, rng.randint(0, 40)]),
        optimizer_seconds=0.25,
    )


def run(choice):
    """(kept, peak, seconds) of a chain alone: forward through all segments, then backward."""
    alive, worst = 0, 0
    for option in choice:
        alive += option.kept_bytes
        worst = max(worst, alive + option.transient_bytes)
    kept = alive
    for option in reversed(choice):
        worst = max(worst, alive + option.transient_bytes)
        alive -= option.kept_bytes
    assert alive == 0
    return kept, worst, sum(option.seconds for option in choice)


def runs(segments):
    return [run(choice) for choice in product(*(segment.options for segment in segments))]


def tails(table):
    """(peak, seconds) of every way to decode and score, beside the steps' kept bytes."""
    rewards = [] if table.rewards else [(table.reserve_bytes, 0.0)]
    for stage in table.rewards:
        for _, peak, seconds in runs(stage.segments):
            if stage.replayed:
                rewards.append((max(peak, stage.forward_bytes), stage.forward_seconds + stage.runs * seconds))
            else:
                rewards.append((peak, seconds))
    ways = []
    for stage in table.decoders:
        for kept, peak, seconds in runs(stage.segments):
            for reward_peak, reward_seconds in rewards:
                if stage.replayed:
                    moments = [stage.forward_bytes, reward_peak, peak]
                    total = stage.forward_seconds + stage.runs * seconds + reward_seconds
                else:
                    moments = [peak, kept + reward_peak, peak]
                    total = seconds + reward_seconds
                ways.append((table.image_bytes + max(moments), total))
    return np.array(ways)


def every_plan(table, num_steps, grad_steps, use=GraphUse.NONE):
    """(peak, seconds) of every plan: resident steps with every option each, every replay, every tail."""
    ratio = table.graphs.sampling_ratio if use != GraphUse.NONE else 1
    sampling_seconds, closed_seconds = ratio * table.sampling_seconds, ratio * table.closed[1]
    replay_ratio = table.graphs.replay_ratio if use == GraphUse.ALL else 1

    def pool(replay_peak):
        """What the graphs keep: the memory of the largest, and their static tensors."""
        if use == GraphUse.NONE:
            return 0
        return table.graphs.static_bytes + max(table.sampling_bytes, replay_peak if use == GraphUse.ALL else 0)

    base = sum(table.fixed.values()) + table.latent_bytes * (2 + grad_steps)
    step, tail = np.array(runs(table.step)), tails(table)
    images = table.image_bytes + (table.sums_bytes if grad_steps > 1 else 0)  # and sums: what a step finds
    plans = []
    for resident in range(grad_steps + 1):
        chosen = np.array(list(product(range(len(step)), repeat=resident)), dtype=int).reshape(
            len(step) ** resident, resident
        )
        kept, peak, seconds = (step[:, column][chosen] for column in range(3))
        before = np.cumsum(kept, axis=1) - kept
        worst = np.max(before + peak + images, axis=1, initial=0)
        total = kept.sum(axis=1)
        if num_steps > resident:
            worst = np.maximum(worst, total + table.sampling_bytes)
        worst = np.maximum(worst[:, None], total[:, None] + tail[:, 0]).ravel()
        took = (seconds.sum(axis=1)[:, None] + tail[:, 1]).ravel()
        took = took + (grad_steps - resident) * sampling_seconds + (num_steps - grad_steps) * closed_seconds
        took = took + table.optimizer_seconds
        if resident == grad_steps:
            plans.append(np.stack((base + pool(0) + worst, took), axis=1))
        else:
            for _, replay_peak, replay_seconds in step:
                own_peak = 0 if use == GraphUse.ALL else replay_peak
                peaks = base + pool(replay_peak) + np.maximum(worst, images + own_peak)
                replays_took = (grad_steps - resident) * replay_ratio * replay_seconds
                plans.append(np.stack((peaks, took + replays_took), axis=1))
    return np.concatenate(plans)


def walked(table, plan):
    """Peak of a plan under its own gates, step after step."""
    grad_steps = len(plan.resident_steps + plan.replayed_steps)
    base, images = table.base_bytes(grad_steps), table.image_bytes
    sums = table.sums_bytes if grad_steps > 1 else 0

    def chosen(segments, options):
        return run([segment.option(options[segment.name]) for segment in segments])

    def stage(stages, choice):
        if choice is None:
            return 0, table.reserve_bytes
        found = next(stage for stage in stages if stage.name == choice.name)
        kept, peak, _ = chosen(found.segments, choice.options)
        return (0, max(peak, found.forward_bytes)) if found.replayed else (kept, peak)

    kept, moments = 0, []
    for step in range(plan.num_steps):
        if step in plan.resident_steps:
            own, peak, _ = chosen(table.step, plan.resident_options[plan.resident_steps.index(step)])
            moments.append(kept + peak + images + sums)
            kept += own
        else:
            moments.append(kept + table.sampling_bytes)
    decoder_kept, decoder_peak = stage(table.decoders, plan.decoder)
    moments += [kept + images + decoder_peak, kept + images + decoder_kept + stage(table.rewards, plan.reward)[1]]
    if plan.replayed_steps:
        moments.append(images + sums + chosen(table.step, plan.replay_options)[1])
    return base + max(moments)
