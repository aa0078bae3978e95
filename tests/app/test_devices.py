"""Devices are checked before anything is loaded."""

from __future__ import annotations

import pytest
import torch

from app.devices import DeviceError, require_device


def test_the_cpu_is_there() -> None:
    assert require_device("cpu") == "cpu"


@pytest.mark.parametrize("name", ["", "gpu", "cuda:x", "mps", "CPU"])
def test_unknown_names(name: str) -> None:
    with pytest.raises(DeviceError, match="choose cpu or cuda"):
        require_device(name)


def test_one_gpu_more_than_there_are() -> None:
    name = f"cuda:{torch.cuda.device_count()}"
    with pytest.raises(DeviceError, match=f"device {name}: .*num_gpus"):
        require_device(name)
