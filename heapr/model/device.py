"""Where a model goes. In: a device's name. Out: torch's device, or a refusal."""

from __future__ import annotations

import torch

from heapr.errors import ConfigError, NotHereError


def find_device(name: str, option: str = "runtime.device") -> torch.device:
    """The device of a name, or of "auto".

    Args:
        option: what the user gave the name for.

    Raises:
        NotHereError: torch does not see it.
        ConfigError: no device has this name, or it is of a kind that is not served.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    choices = "choose auto, cpu, cuda or cuda:<number>"
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError) as error:
        raise ConfigError(f"{option}='{name}' is unknown; {choices}") from error
    if device.type not in {"cpu", "cuda"} or (device.type == "cpu" and device.index is not None):
        reason = "there is one CPU" if device.type == "cpu" else f"{device.type} devices are not served"
        raise ConfigError(f"{option}='{name}' cannot be used, because {reason}; {choices}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise NotHereError(
            f"{option}='{name}', but torch sees {torch.cuda.device_count()} GPUs; choose auto or cpu"
        )
    return device
