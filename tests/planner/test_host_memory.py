"""How much host memory may be locked: a share of the least that the computer and its control groups have free."""

import pytest

from alignprop_fast.planner import lockable_bytes
from alignprop_fast.planner.host_memory import available_bytes

GIB = 2**30
NO_LIMIT_V1 = 9223372036854771712


@pytest.fixture
def computer(tmp_path, monkeypatch):
    """Writes files of `proc` and `sys`; 64 GiB are available."""
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)

    def write(**files):
        for name, content in {"proc/meminfo": f"MemTotal: 9 kB\nMemAvailable: {64 * 2**20} kB\n", **files}.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(str(content))
        return tmp_path

    return write


def group_v2(path, limit, use, inactive=0):
    folder = f"sys/fs/cgroup/{path}".rstrip("/")
    return {
        f"{folder}/memory.max": f"{limit}\n",
        f"{folder}/memory.current": f"{use}\n",
        f"{folder}/memory.stat": f"anon 5\ninactive_file {inactive}\nactive_file 7\n",
    }


def group_v1(path, limit, use, inactive=0):
    folder = f"sys/fs/cgroup/memory/{path}".rstrip("/")
    return {
        f"{folder}/memory.limit_in_bytes": f"{limit}\n",
        f"{folder}/memory.usage_in_bytes": f"{use}\n",
        f"{folder}/memory.stat": f"inactive_file 1\ntotal_inactive_file {inactive}\n",
    }


def test_without_groups_it_is_what_the_computer_has_available(computer):
    assert available_bytes(computer()) == 64 * GIB


@pytest.mark.parametrize(
    ("groups", "files", "expected"),
    [
        ("0::/job\n", group_v2("job", 16 * GIB, 6 * GIB), 10 * GIB),
        ("0::/job\n", group_v2("job", 16 * GIB, 6 * GIB, inactive=4 * GIB), 14 * GIB),
        ("0::/job\n", group_v2("job", "max", 6 * GIB), 64 * GIB),
        ("0::/slice/job\n", {**group_v2("slice", 8 * GIB, GIB), **group_v2("slice/job", "max", GIB)}, 7 * GIB),
        ("0::/\n", group_v2("", 8 * GIB, 9 * GIB), 0),
        ("5:cpu:/\n4:memory:/job\n0::/\n", group_v1("job", 16 * GIB, 6 * GIB, inactive=GIB), 11 * GIB),
        # A container that sees the host's path, and its own group as the root.
        ("4:hugetlb,memory:/docker/7\n", group_v1("", 12 * GIB, 2 * GIB), 10 * GIB),
        ("4:memory:/\n", group_v1("", NO_LIMIT_V1, GIB), 64 * GIB),
        ("5:cpu:/job\n", group_v1("job", GIB, 0), 64 * GIB),
    ],
)
def test_a_control_group_may_have_less(computer, groups, files, expected):
    assert available_bytes(computer(**{"proc/self/cgroup": groups, **files})) == expected


def test_ranks_share_it(computer, monkeypatch):
    root = computer()
    assert lockable_bytes(root=root) == 32 * GIB
    assert lockable_bytes(16 * GIB, root) == 16 * GIB
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert lockable_bytes(root=root) == 4 * GIB
    assert lockable_bytes(16 * GIB, root) == 2 * GIB


def test_here_there_is_some():
    assert lockable_bytes() > 0
