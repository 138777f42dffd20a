"""The device for a model. In: a device's name. Out: a torch device, or a refusal."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from heapr.errors import ConfigError, NotHereError


def find_device(name: str, option: str = "runtime.device") -> torch.device:
    """The device with this name; "auto" is the GPU if torch sees one, else the CPU.

    Args:
        option: the option that holds the name, for messages.

    Raises:
        NotHereError: torch does not see the device.
        ConfigError: no device has this name, or heapr does not support its kind.
    """
    if name == "auto":
        found = "cuda" if torch.cuda.is_available() else "cpu"
        return torch.device(found)
    choices = "choose auto, cpu, cuda or cuda:<number>"
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError) as error:
        raise ConfigError(f"{option}='{name}' is unknown; {choices}") from error
    if device.type not in {"cpu", "cuda"}:
        raise ConfigError(
            f"{option}='{name}' cannot be used: {device.type} devices are not supported; {choices}"
        )
    if device.type == "cpu" and device.index is not None:
        raise ConfigError(f"{option}='{name}' cannot be used: CPUs have no number; {choices}")
    num_gpus = torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= num_gpus:
        raise NotHereError(f"{option}='{name}', but torch sees {num_gpus} GPUs; choose auto or cpu")
    return device


@contextmanager
def exact_products() -> Iterator[None]:
    """Inside the context, products of float32 matrices are computed in float32, on a GPU too, not in TF32."""
    previous = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(previous)
