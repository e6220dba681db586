"""The measured choice between implementations, with two real ones of very different costs."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from alignprop_fast.ops import autotune, switched_off

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(autotune.Path, "home", lambda: tmp_path)
    autotune.forget()
    yield
    autotune.forget()
    switched_off.forget()


@pytest.fixture
def file():
    """The cache file."""
    return autotune._file(autotune.device_name(CPU))


class Product:
    """x @ x of a side; raises `error` instead, or has a fault."""

    def __init__(self, side=8, error=None, fault=None):
        self.x, self.error, self.wrong, self.calls = torch.ones(side, side), error, fault, 0

    def run(self):
        self.calls += 1
        if self.error is not None:
            raise self.error
        return self.x @ self.x

    def fault(self):
        return self.wrong


def candidates(**others):
    return {"large": Product(512), **others, "small": Product()}


def refuses():
    return Product(error=RuntimeError("needs another GPU\nand more words"))


def chosen(made):
    return autotune.fastest("product", made, CPU)


def test_the_fastest_is_taken_and_the_others_explained():
    assert chosen(candidates(refuses=refuses())) == "small"
    text = autotune.explain("product", CPU)
    assert "large" in text and "small" in text and "refuses: needs another GPU" in text and "more words" not in text


def test_measured_once_then_read_from_disk():
    chosen(candidates())
    autotune.forget()
    later = candidates()
    assert chosen(later) == "small" == chosen(later)
    assert not any(product.calls for product in later.values())


def test_what_failed_is_tried_again_by_the_next_process(file):
    """By then there may be a compiler, or free memory."""
    chosen({"large": Product(512), "small": refuses()})
    assert "refuses" not in file.read_text() and "needs another GPU" not in file.read_text()
    again = refuses()
    assert chosen({"large": Product(512), "small": again}) == "large" and not again.calls, "not twice in one process"
    autotune.forget()
    assert chosen(candidates()) == "small"


@pytest.mark.parametrize("error", [AssertionError("a compiler's"), subprocess.CalledProcessError(1, "gcc")])
def test_a_candidate_may_fail_in_any_way(error):
    assert chosen({"broken": Product(error=error), "large": Product(512)}) == "large"


def test_one_with_wrong_results_does_not_win():
    wrong = Product(1, fault="errors are 7 times what is allowed")
    assert chosen({"wrong": wrong, "large": Product(512)}) == "large"
    assert "wrong: errors are 7 times" in autotune.explain("product", CPU)
    assert switched_off.reason("product: wrong") and not wrong.calls


def test_a_full_device_skips_a_candidate_and_is_an_error_only_where_none_is_left():
    full = Product(error=torch.OutOfMemoryError("CUDA out of memory"))
    assert chosen({"full": full, "large": Product(512)}) == "large"
    assert "full: out of memory" in autotune.explain("product", CPU)
    for _ in range(2):  # the second time, after room was made, is a new trial
        with pytest.raises(torch.OutOfMemoryError):
            autotune.fastest("other", {"full": full}, CPU)
    assert autotune.fastest("other", {"full": Product()}, CPU) == "full"


@pytest.mark.parametrize(
    "content",
    [
        *("{", "[]", "null", "3", '{"product": {}}', '{"product": 3}', '{"product": []}', "[" * 100_000, "\udcff"),
        *('{"product": {"gone": 0.0}}', '{"product": {"large": NaN}}', '{"product": {"large": -1}}'),
        *('{"product": {"large": "0"}}', '{"product": {"large": false}}', '{"product": {"large": -Infinity}}'),
    ],
    ids=lambda content: content[:30].encode(errors="replace").decode(),
)
def test_a_damaged_cache_is_as_if_it_were_not_there(file, content):
    chosen(candidates())
    file.write_bytes(content.encode(errors="surrogateescape"))
    autotune.forget()
    assert chosen(candidates()) == "small"
    assert set(json.loads(file.read_text())["product"]) >= {"small", "large"}


def test_processes_keep_each_other_s_times(file):
    """Both have read the file before either writes."""
    autotune._table(autotune.device_name(CPU))
    code = (
        f"import pathlib; pathlib.Path.home = lambda: pathlib.Path({str(Path.home())!r})\n"
        "import torch; from alignprop_fast.ops import autotune\n"
        "class Nothing:\n    run = fault = lambda self: None\n"
        "autotune.fastest('theirs', {'one': Nothing()}, torch.device('cpu'))"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    chosen(candidates())
    assert json.loads(file.read_text()).keys() == {"theirs", "product"}


def test_a_cache_folder_that_cannot_be_written_is_no_obstacle(tmp_path):
    (tmp_path / ".cache").write_text("a file, where a folder should be")
    assert chosen(candidates()) == "small"


def test_what_the_times_depend_on_is_in_the_key():
    import alignprop_fast

    plain = autotune.device_name(CPU)
    assert alignprop_fast.__version__ in plain and torch.__version__ in plain
    torch.use_deterministic_algorithms(True)
    try:
        assert autotune.device_name(CPU) != plain
    finally:
        torch.use_deterministic_algorithms(False)


def test_what_is_switched_off_later_is_not_chosen_again():
    made = candidates()
    assert chosen(made) == "small"
    del made["small"]
    switched_off.switch_off("small", "for this test")
    assert chosen(made) == "large"


def test_a_choice_is_made_once_but_anew_after_a_failure_and_while_a_graph_is_captured(monkeypatch):
    made = []

    def choose(name):
        made.append(name)
        return name

    assert [autotune.remembered("problem", choose, CPU, name) for name in "ab"] == ["a", "a"]
    switched_off.switch_off("a", "for this test")
    assert [autotune.remembered("problem", choose, CPU, name) for name in "cd"] == ["c", "c"]
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert [autotune.remembered("problem", choose, torch.device("cuda"), name) for name in "ef"] == ["e", "f"]
    assert made == ["a", "c", "e", "f"]


def test_nothing_can_run():
    with pytest.raises(RuntimeError, match="needs another GPU"):
        autotune.fastest("none", {"refuses": refuses()}, CPU)


def test_difference_sees_nan_and_twice_the_error():
    exact = [torch.zeros(3, dtype=torch.float64)]
    plain = [torch.tensor([0.0, 1e-3, 0.0])]
    assert autotune.difference([torch.tensor([1.9e-3, 0, 0])], plain, exact) <= 1
    assert autotune.difference([torch.tensor([2.1e-3, 0, 0])], plain, exact) > 1
    assert not autotune.difference([torch.tensor([0, float("nan"), 0])], plain, exact) <= 1


def test_a_changed_kernel_is_measured_again(tmp_path):
    source = tmp_path / "kernel.py"
    source.write_text("BLOCK = 64\n")
    before = autotune.source_digest(tmp_path)
    assert before == autotune.source_digest(tmp_path)
    source.write_text("BLOCK = 32\n")
    assert autotune.source_digest(tmp_path) != before
    assert list(autotune._KERNELS.glob("*.py")) and autotune.source_digest(autotune._KERNELS) in autotune.device_name(
        CPU
    )
