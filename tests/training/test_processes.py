"""Messages between several processes. test_trainer_processes.py tests real ones."""

import torch

from alignprop_fast.training.processes import buckets


def test_buckets_hold_one_dtype_and_no_more_than_they_may():
    tensors = [torch.zeros(n) for n in (3, 4, 9, 1)] + [torch.zeros(2, dtype=torch.bfloat16)]
    found = list(buckets(tensors, most_bytes=28))
    assert [[one.numel() for one in bucket] for bucket in found] == [[3, 4], [9], [1], [2]]
    assert [id(one) for bucket in found for one in bucket] == [id(one) for one in tensors]
    assert list(buckets([])) == []
