"""Working memory by hand; the machine's description."""

from __future__ import annotations

import pytest
import torch

from heapr.measure import WorkingMemory, machine

CPU = torch.device("cpu")


def test_counts_what_is_alive_at_once_and_not_what_was_there_before() -> None:
    before = torch.ones(1000)
    with WorkingMemory(CPU) as memory:
        a = before + 1
        view = a.view(10, 100).T
        b = a * 2  # 8000 bytes with a
        assert memory.take_peak() == 8000
        del b
        c = view.sum()
        assert memory.take_peak() == 8000  # what was alive when the peak was taken
        assert memory.take_peak() == 4004  # a, which its view keeps, and c
        del a, view
        before += 1
        assert memory.take_peak() == 4004
        assert memory.take_peak() == 4
    assert float(c) == 2000


def test_in_place_and_repeated_use_count_once() -> None:
    with WorkingMemory(CPU) as memory:
        a = torch.zeros(100)
        for _ in range(5):
            a.add_(1)
        assert memory.take_peak() == 400


def test_the_machine_names_device_and_threads() -> None:
    found = machine(CPU)
    assert found["device"] == "cpu" and found["threads"] == torch.get_num_threads() and found["name"]


@pytest.mark.gpu
def test_on_a_gpu_the_allocator_counts() -> None:
    device = torch.device("cuda")
    before = torch.ones(1000, device=device)
    with WorkingMemory(device) as memory:
        a = before + 1
        assert 4000 <= memory.take_peak() <= 8192
        del a
    assert machine(device)["device"] == "cuda"
