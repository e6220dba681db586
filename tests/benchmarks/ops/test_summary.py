"""The table that ends a run on a GPU: the best peer, and what is no peer."""

from benchmarks.ops import summary


def row(implementation, p50_ms, batch="4", status="ok"):
    shape = {"op": "attention", "model": "SDXL 1024", "sizes": "10x4096x77x64", "direction": "backward"}
    return {
        **shape,
        "batch": batch,
        "implementation": implementation,
        "status": status,
        "p50_ms": p50_ms,
        "fraction": "0.5",
    }


def test_best_peer_of_the_largest_batch():
    peers = [row("eager", "4.0"), row("sdpa flash", "3.0"), row("xformers", "", status="cannot run: no")]
    others = [row("triton", "1.0"), row("bare product", "0.1"), row("eager", "0.5", batch="1")]
    (line,) = summary.lines([row("ours", "2.0", batch="1"), *others[2:], row("ours", "2.0"), *peers, *others[:2]])
    assert " b4 " in line and "2.000 ms" in line and line.endswith("sdpa flash 3.000 ms, 1.50 times")


def test_a_wrong_op_shows_as_wrong():
    (line,) = summary.lines([row("ours", "", status="WRONG: error 1, no speed")])
    assert line.endswith("WRONG: error 1, no speed")
