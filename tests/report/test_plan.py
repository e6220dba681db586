"""The picture of a plan: what it draws are the planner's own figures, and all names are on it."""

import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image

from alignprop_fast.planner import CostTable, Option, Segment, Solver, Stage, simulate
from alignprop_fast.report import plan
from alignprop_fast.report.plan import plot_plan

GIB = 2**30


def make_table(reward=True):
    keep, again = Option("keep", 4 * GIB, GIB // 2, 0.3), Option("recompute", GIB // 4, GIB, 0.45)
    step = tuple(Segment(f"mid_block.attentions.{k}", (keep, again)) for k in range(2))
    decoder = Stage("batch", (Segment("rest", (Option("keep", 5 * GIB, GIB // 2, 0.2),)),))
    rewards = (Stage("batch", (Segment("rest", (Option("keep", GIB, GIB // 4, 0.05),)),)),) if reward else ()
    fixed = {"weights": 6 * GIB, "optimizer": GIB // 2, "workspace": GIB // 8}
    return CostTable(fixed, 2**18, 2**23, step, GIB // 2, 0.1, (decoder,), rewards)


@pytest.fixture
def drawn(monkeypatch):
    """The figures that are saved."""
    figures: list[Figure] = []
    save = plan.save_figure
    monkeypatch.setattr(plan, "save_figure", lambda figure, path: (figures.append(figure), save(figure, path)))
    return figures


@pytest.mark.parametrize("reward", [True, False])
def test_it_draws_the_planners_figures(tmp_path, drawn, reward):
    table = make_table(reward)
    plan = Solver(table, 20, 10).plan(range(10, 20), 24 * GIB)
    assert plan.resident_steps and plan.replayed_steps
    plot_plan(tmp_path / "plan.png", table, plan, "a model, batch 1")
    assert Image.open(tmp_path / "plan.png").size[0] > 1000 and len(list(tmp_path.iterdir())) == 1
    (axes,) = drawn[0].axes
    heights = {max(line.get_ydata()) for line in axes.get_lines() if len(line.get_ydata()) > 2}
    assert max(heights) == pytest.approx(plan.peak_bytes / GIB)
    assert axes.get_xlim()[1] == pytest.approx(plan.seconds)
    names = {text.get_text() for text in axes.texts}
    assert {"sampling", "resident", "decoder, reward", "resident, backward", "replayed steps"} <= names
    assert "budget 24.00 GiB" in names and "peak" in axes.get_title(loc="left")
    legend = [text.get_text() for text in axes.get_legend().get_texts()]
    assert legend == ["weights", "adapters and optimizer", "workspace", "kept", "transient"]


def test_areas_add_up_to_the_bytes_of_each_moment(tmp_path, drawn):
    table = make_table()
    plan = Solver(table, 6, 6).plan(range(6), 40 * GIB)
    plot_plan(tmp_path / "plan.png", table, plan, "a model")
    outline = next(line for line in drawn[0].axes[0].get_lines() if len(line.get_ydata()) > 2)
    assert list(outline.get_ydata()[::2]) == pytest.approx([m.bytes / GIB for m in simulate(table, plan)])
    assert list(outline.get_xdata()[::2]) == pytest.approx([m.start_seconds for m in simulate(table, plan)])


def test_names_of_phases_never_cover_one_another(tmp_path, drawn):
    table = make_table()
    plot_plan(tmp_path / "plan.png", table, Solver(table, 50, 50).plan(range(50), 24 * GIB), "a model")
    figure = drawn[0]
    labels = [text for text in figure.axes[0].texts if not text.get_text().startswith("budget")]
    # Of the text alone: a label's own extent includes its pointer.
    boxes = [Text.get_window_extent(label, figure.canvas.get_renderer()) for label in labels]
    assert not [(a, b) for k, a in enumerate(boxes) for b in boxes[:k] if a.overlaps(b)]


def test_plans_that_the_table_cannot_price_are_refused(tmp_path):
    plan = Solver(make_table(), 4, 4).plan(range(4), 40 * GIB)
    other = CostTable({}, 1, 1, (), 1, 1.0, (Stage("image", ()),))
    with pytest.raises(ValueError, match="no stage batch"):
        plot_plan(tmp_path / "plan.png", other, plan, "a model")
    assert list(tmp_path.iterdir()) == []
