"""What one process does of a group, and which GPU each has. Several of them: tests/evaluation and tests/training."""

from __future__ import annotations

import pytest
import torch

from attnorm.system import process_group as module
from attnorm.system.process_group import ProcessGroup


def test_parts_of_any_shape_are_one_processes_own() -> None:
    part = torch.zeros(2, 3)
    assert ProcessGroup().gather(part) == [part] and ProcessGroup().as_first([True, False]) == [True, False]


def test_each_process_has_its_own_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    names: list[str] = []

    def find_device(name: str) -> torch.device:
        names.append(name)
        return torch.device("cuda" if name == "auto" else name)

    monkeypatch.setattr(module, "find_device", find_device)
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert module.find_own_device("auto") == torch.device("cuda")  # a stray variable of one process alone
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert module.find_own_device("auto") == torch.device("cuda:3")
    assert module.find_own_device("cuda:1") == torch.device("cuda:1")
    assert module.find_own_device("cpu") == torch.device("cpu")
