"""Which errors of a step mean that there is too little memory."""

from __future__ import annotations

import pytest
import torch

from b2batch.engine.memory import is_out_of_memory


@pytest.mark.parametrize(
    ("error", "is_shortage"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), True),
        (MemoryError(), True),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), True),
        (RuntimeError("could not create a primitive"), True),  # oneDNN, under a limit of address space
        (RuntimeError("CUDA error: device-side assert triggered"), False),
        (RuntimeError("The size of tensor a (3) must match the size of tensor b (4)"), False),
        (ValueError("DefaultCPUAllocator: "), False),
    ],
)
def test_a_shortage_of_memory_is_told_from_other_faults(error: Exception, is_shortage: bool) -> None:
    assert is_out_of_memory(error) is is_shortage
