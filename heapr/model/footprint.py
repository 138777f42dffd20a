"""How much memory a model and a batch take, and how much there is.

In: a model on the meta device, and a batch's shape. Out: bytes, by part; exact for what follows from shapes,
estimates for activations.
"""

from __future__ import annotations

import math
import resource
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from heapr.model.costs import activation_bytes
from heapr.model.loss import LOGITS_CHUNK
from heapr.model.moe import MoEModel, experts_per_token

MEMORY, STATUS = Path("/proc/meminfo"), Path("/proc/self/status")
CGROUP = Path("/sys/fs/cgroup")
FLOAT = 4  # bytes of a float32 value
BUFFERS = 64 * 2**20  # of torch's libraries while they work
# Times the weights that transformers' loading takes on the CPU, measured with a Qwen3-MoE; mapped files come
# on top. Experts are put together while what they are made of is still there.
LOADING_AS_STORED, LOADING_CONVERTED = 1.2, 1.8


@dataclass(frozen=True)
class Footprint:
    """Bytes of a model, and of one batch in it.

    Attributes:
        weights: all parameters.
        beside: parameters beside the decoder layers, such as embeddings and head.
        layer: parameters of the largest decoder layer.
        experts: parameters of the largest layer's routed experts.
        hidden: hidden states of one batch behind one layer.
        logits: one chunk of logits with its softmax and gradient, float32.
        num_layers: decoder layers.
        num_experts: routed experts of all layers.
        expert_tokens: tokens of one batch that an expert gets, on average.
    """

    weights: int
    beside: int
    layer: int
    experts: int
    hidden: int
    logits: int
    num_layers: int
    num_experts: int
    expert_tokens: int


def footprint(model: MoEModel, num_sequences: int, length: int) -> Footprint:
    """The footprint of a model on the meta device with batches of so many sequences of a length."""
    weights = _num_bytes(model.model.parameters())
    layers = [_num_bytes(layer.parameters()) for layer in model.decoder_layers]
    num_tokens = num_sequences * length
    embeddings = model.model.get_input_embeddings().weight
    vocabulary_size: int = model.model.get_output_embeddings().weight.shape[0]
    chunk = min(LOGITS_CHUNK, num_tokens * vocabulary_size)
    most_experts = max(layer.num_experts for layer in model.layers)
    return Footprint(
        weights=weights,
        beside=weights - sum(layers),
        layer=max(layers),
        experts=max(_num_bytes(layer.experts.parameters()) for layer in model.layers),
        hidden=num_tokens * int(embeddings.shape[-1]) * embeddings.element_size(),
        logits=3 * FLOAT * chunk,
        num_layers=len(layers),
        num_experts=sum(layer.num_experts for layer in model.layers),
        expert_tokens=math.ceil(num_tokens * experts_per_token(model.model) / most_experts),
    )


def loading_factor(device: torch.device, stored: torch.dtype | None, dtype: torch.dtype) -> float:
    """Memory that loading a whole model takes, divided by its weights.

    Args:
        device: where the weights go.
        stored: dtype in the files; None if it is not known, which counts as another one.
        dtype: of the weights in memory.
    """
    if device.type != "cpu":
        return 1.0
    return LOADING_AS_STORED if stored == dtype else LOADING_CONVERTED


def batch_bytes(model: MoEModel, num_sequences: int, length: int) -> int | None:
    """Bytes that one batch holds between forward and backward; None if the family's layers do not run on the
    meta device."""
    try:
        return activation_bytes(model, num_sequences, length)
    except RuntimeError:  # a layer reads values, which the meta device does not have
        return None


def interpreter_bytes() -> int:
    """Memory that this process has resident now."""
    return _kilobytes(STATUS, "VmRSS") or 0


def free_memory(device: torch.device) -> int:
    """Bytes that this process can still take on a device.

    On the CPU that is what the system has available, and no more than the limits of the process and of its
    control group leave.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free)
    return max(0, min(_available(), _left_by_limits(), _left_by_group()))


def _num_bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _available() -> int:
    return _kilobytes(MEMORY, "MemAvailable") or torch.iinfo(torch.int64).max


def _left_by_limits() -> int:
    """Under RLIMIT_DATA and RLIMIT_AS."""
    left = torch.iinfo(torch.int64).max
    for limit, name in ((resource.RLIMIT_DATA, "VmData"), (resource.RLIMIT_AS, "VmSize")):
        soft, _ = resource.getrlimit(limit)
        used = _kilobytes(STATUS, name)
        if soft != resource.RLIM_INFINITY and used is not None:
            left = min(left, soft - used)
    return left


def _left_by_group() -> int:
    """Under memory.max of the control group, without what its page cache could give back."""
    try:
        limit = (CGROUP / "memory.max").read_text().strip()
        used = int((CGROUP / "memory.current").read_text())
        statistics = dict(line.split() for line in (CGROUP / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return torch.iinfo(torch.int64).max
    if limit == "max":
        return torch.iinfo(torch.int64).max
    return int(limit) - used + int(statistics.get("inactive_file", 0)) + int(statistics.get("active_file", 0))


def _kilobytes(path: Path, name: str) -> int | None:
    """A value of a file of the system, in bytes; None if it is not there."""
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    return None
