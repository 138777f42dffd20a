"""Memory, time and bytes read of a model that is streamed, against the same model in memory.

Run:  python benchmarks/stream.py
      (a random Qwen3-MoE of 24 layers, 2 GB in bfloat16, made below --folder when it is not there)
Out:  a table; each row was measured in a process of its own, streamed ones under a hard limit: RLIMIT_DATA,
      which counts memory that belongs to the process alone, and not the files that it has mapped.

The limit is the formula's: the largest layer, one batch's activations in it, embeddings and head, and 300 MB,
beyond what the interpreter takes with all modules imported.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from heapr.calibration.collector import collect
from heapr.model.checkpoint import save_checkpoint
from heapr.model.find_model import find_model
from heapr.model.footprint import batch_bytes, footprint, free_memory, loading_factor
from heapr.model.kernels import kernels_of
from heapr.model.load import ModelSource
from heapr.model.loss import next_token_loss
from heapr.model.moe import MoEModel
from heapr.model.passes import Way, final_hidden_states
from heapr.model.shelf import Files
from heapr.model.span import reads_of
from heapr.placement import Placement
from heapr.pruning.repair import ExpertRepair
from heapr.pruning.repaired import RepairedLayers
from heapr.pruning.surgery import remove, remove_and_repair
from heapr.stage_memory import CALIBRATE, CHECKPOINT, EVALUATE_DENSE, REPAIR
from heapr.types import LayerStatistics, Plan

MB = 1e6
CPU = torch.device("cpu")
STATUS = Path("/proc/self/status")
WORK = ("calibrate", "prune and repair", "checkpoint", "perplexity")
STAGES = dict(zip(WORK, (CALIBRATE, REPAIR, CHECKPOINT, EVALUATE_DENSE), strict=True))
KEPT = 0.75  # share of the atomic experts
SPARE = 300e6  # bytes beside the formula


@dataclass(frozen=True)
class Shape:
    """What is measured."""

    layers: int = 24
    experts: int = 48
    width: int = 256
    model_width: int = 1024
    sequences: int = 8
    length: int = 256
    batch_size: int = 2


def make_model(folder: Path, shape: Shape) -> None:
    """Save a random model, in shards, unless it is there."""
    if (folder / "config.json").is_file():
        return
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=8192, hidden_size=shape.model_width, num_hidden_layers=shape.layers,
        num_attention_heads=16, num_key_value_heads=4, head_dim=64, num_experts=shape.experts,
        num_experts_per_tok=4, moe_intermediate_size=shape.width, max_position_embeddings=4096,
        dtype=torch.bfloat16,
    )  # fmt: skip
    Qwen3MoeForCausalLM(config).to(torch.bfloat16).save_pretrained(folder, max_shard_size="500MB")


def source_of(arguments: argparse.Namespace) -> ModelSource:
    digests = arguments.folder.parent / "digests"
    return find_model(str(arguments.folder), dtype=arguments.dtype, digests=digests)


def batches_of(shape: Shape) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    ids_NW = torch.randint(0, 8192, (shape.sequences, shape.length), generator=generator)
    return list(ids_NW.split(shape.batch_size))


def plan_of(model: MoEModel) -> Plan:
    """A share of each layer's atomic experts stays."""
    layers = {}
    for layer in model.layers:
        generator = torch.Generator().manual_seed(layer.index)
        layers[layer.index] = torch.rand(layer.num_experts, layer.width, generator=generator) < KEPT
    return Plan(layers)


class PeakMeter:
    """Samples the resident memory of the process that is its own, and all of it."""

    def __init__(self) -> None:
        self.own = self.all = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> PeakMeter:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._stop.wait(0.01):
            self.own = max(self.own, resident("RssAnon"))
            self.all = max(self.all, resident("VmRSS"))


def resident(name: str) -> int:
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1]) * 1024


def work(name: str, model: MoEModel, source: ModelSource, shape: Shape, folder: Path) -> Callable[[], Any]:
    """One thing to do with the dense model."""
    batches = batches_of(shape)

    def calibrate() -> Any:
        way = Way(model.spans, Files(folder / "tape", about={})) if model.is_streamed else None
        return collect(model, batches, way=way)

    def repair() -> Any:
        files = Files(folder / "repaired", about={}) if model.is_streamed else None
        return remove_and_repair(model, plan_of(model), ExpertRepair(), batches, RepairedLayers(files))

    def checkpoint() -> Any:
        remove(model, plan_of(model))
        save_checkpoint(model, source.folder, folder / "checkpoint", about={})

    def perplexity() -> Any:
        for ids_NW, hidden in final_hidden_states(model, batches):
            with torch.no_grad():
                next_token_loss(model, hidden, ids_NW).sum().item()

    return dict(zip(WORK, (calibrate, repair, checkpoint, perplexity), strict=True))[name]


def measure(arguments: argparse.Namespace, shape: Shape) -> dict[str, Any]:
    """What one process does: open the model, do the work once."""
    source = source_of(arguments)
    before = {name: resident(name) for name in ("RssAnon", "VmRSS", "VmData")}
    if arguments.limit:
        limit = before["VmData"] + arguments.limit
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
        placement = predicted(source, shape, is_streamed=arguments.streamed)
        replace(placement, free=free_memory(CPU)).check(CPU, [])
    if arguments.cold:
        forget_files(arguments.folder)
    with tempfile.TemporaryDirectory(dir=arguments.folder.parent) as folder, PeakMeter() as meter:
        started = time.perf_counter()
        if arguments.streamed:
            model = source.stream(CPU, tapes=Path(folder) / "tapes", read_ahead=arguments.read_ahead)
            model.reads = [[layer - 1] if layer else [] for layer in range(shape.layers + 1)]
        else:
            model = source.load(CPU)
            reads_of(model)
        opened, cpu_before = time.perf_counter(), time.process_time()
        residency: Any = model.residency
        bytes_before = residency.weights.shards.bytes_read if arguments.streamed else 0
        work(arguments.work, model, source, shape, Path(folder))()
        finished = time.perf_counter()
    return {
        "seconds": finished - opened,
        "cpu_seconds": time.process_time() - cpu_before,
        "seconds_opening": opened - started,
        "seconds_waiting": residency.seconds_read if arguments.streamed else 0.0,
        "bytes_read": residency.weights.shards.bytes_read - bytes_before if arguments.streamed else 0,
        "own": meter.own - before["RssAnon"],
        "all": meter.all - before["VmRSS"],
        "interpreter": before,
        "files": sum(path.stat().st_size for path in arguments.folder.glob("*.safetensors")),
    }


def forget_files(folder: Path) -> None:
    """Take the weights out of the operating system's cache."""
    for path in folder.glob("*.safetensors"):
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def apart(arguments: argparse.Namespace, name: str, *options: str) -> dict[str, Any]:
    """Measure in a process of its own; its last line if it fails."""
    given = [f"--{field}={value}" for field, value in vars(arguments.shape).items()]
    command = [sys.executable, __file__, f"--folder={arguments.folder}", f"--work={name}"]
    command += [f"--dtype={arguments.dtype}", *given, *options]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        lines = result.stderr.strip().splitlines() or [f"exit status {result.returncode}"]
        return {"failed": lines[-1]}
    found: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return found


def predicted(source: ModelSource, shape: Shape, *, is_streamed: bool) -> Placement:
    """As a dry run predicts."""
    model = source.on_meta()
    nowhere = torch.device("meta")
    statistics = [LayerStatistics.zeros(layer.num_experts, layer.width, nowhere) for layer in model.layers]
    return Placement(
        is_streamed=is_streamed,
        on_disk=True,
        num_last=1,
        by_layer=False,
        sizes=footprint(model, shape.batch_size, shape.length),
        evaluated=footprint(model, shape.batch_size, shape.length),
        kept=KEPT,
        activations=batch_bytes(model, shape.batch_size, shape.length),
        statistics=sum(layer.num_bytes for layer in statistics),
        kernels=kernels_of(CPU, source.dtype, is_streamed=is_streamed),
        num_batches=len(batches_of(shape)),
        loading=loading_factor(CPU, source.stored_dtype, source.dtype),
        free=0,
        why=None,
    )


def compare(arguments: argparse.Namespace) -> None:
    """All rows of the table."""
    shape: Shape = arguments.shape
    source = source_of(arguments)
    placement = predicted(source, shape, is_streamed=True)
    sizes = placement.sizes
    activations = max(0, (placement.activations or 0) - sizes.logits) // sizes.num_layers
    allowed = sizes.layer + activations + sizes.beside
    limit = int(allowed + SPARE)
    print(f"weights {sizes.weights / MB:.0f} MB in {arguments.dtype}, largest layer {sizes.layer / MB:.0f},")
    print(f"beside the layers {sizes.beside / MB:.0f}, one batch in a layer {activations / MB:.0f};")
    print(f"hard limit {limit / MB:.0f} MB beyond the interpreter (RLIMIT_DATA)")
    in_memory = predicted(source, shape, is_streamed=False)
    predictions = {"in memory": in_memory, "streamed": placement, "streamed, cold": placement}
    failed = apart(arguments, "calibrate", f"--limit={limit}")
    print(f"in memory under the limit: {failed.get('failed', 'it fits')}")
    for name in WORK:
        rows = {
            "in memory": apart(arguments, name),
            "streamed": apart(arguments, name, "--streamed", f"--limit={limit}"),
        }
        if name in ("calibrate", "perplexity"):
            cold = apart(arguments, name, "--streamed", "--cold", f"--limit={limit}")
            rows["streamed, cold"] = cold
        for kind, row in rows.items():
            print_row(name, kind, row, rows["in memory"])
            print_prediction(predictions[kind].peak_bytes(STAGES[name]), row)


def growth(arguments: argparse.Namespace) -> None:
    """How streamed calibration of a small model grows when one size doubles, twice."""
    small = Shape(layers=6, experts=16, width=256, model_width=512, sequences=8, length=256)
    print("growth of streamed calibration, and the exponent of each size:")
    for field in ("sequences", "layers", "experts", "width"):
        found = []
        for factor in (1, 2, 4):
            shape = replace(small, **{field: factor * getattr(small, field)})
            name = "-".join(str(value) for value in (shape.layers, shape.experts, shape.width))
            folder = arguments.folder.parent / f"small-{name}"
            make_model(folder, shape)
            one = argparse.Namespace(**{**vars(arguments), "folder": folder, "shape": shape})
            found.append(apart(one, "calibrate", "--streamed"))
        peaks = [row["own"] / MB for row in found]
        seconds = [row["cpu_seconds"] for row in found]
        exponents = [math.log(values[-1] / values[0], 4) for values in (peaks, seconds)]
        numbers = ", ".join(
            f"{peak:.0f} MB {second:.1f} s" for peak, second in zip(peaks, seconds, strict=True)
        )
        print(f"{field:10} {numbers}; memory {exponents[0]:.2f}, CPU time {exponents[1]:.2f}", flush=True)


def print_prediction(peak_bytes: dict[str, int], row: dict[str, Any]) -> None:
    """What a dry run says, divided by what was measured."""
    predicted_bytes = sum(peak_bytes.values())
    ratio = f", {predicted_bytes / row['own']:.2f} of it" if "own" in row else ""
    parts = {name: round(size / MB) for name, size in peak_bytes.items()}
    print(f"{'':17}predicted {predicted_bytes / MB:.0f} MB{ratio} {parts}", flush=True)


def print_row(name: str, kind: str, row: dict[str, Any], base: dict[str, Any]) -> None:
    if "failed" in row:
        print(f"{name:17}{kind:15} failed: {row['failed']}")
        return
    ratio = row["seconds"] / base["seconds"]
    cpu_ratio = row["cpu_seconds"] / base["cpu_seconds"]
    waiting = row["seconds_waiting"] / row["seconds"]
    read = row["bytes_read"] / row["files"]
    memory = f"own {row['own'] / MB:6.0f} MB  all {row['all'] / MB:6.0f} MB"
    took = f"{row['seconds']:6.1f} s ({ratio:.2f})  CPU {row['cpu_seconds']:5.1f} s ({cpu_ratio:.2f})"
    took += f"  waiting {waiting:4.0%}  read {read:.2f} of the files"
    print(f"{name:17}{kind:15} {memory}  {took}", flush=True)


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "heapr_stream" / "model")
    parser.add_argument("--work", choices=WORK)
    parser.add_argument("--streamed", action="store_true")
    parser.add_argument("--cold", action="store_true")
    parser.add_argument("--read-ahead", action="store_true", help="the next layer, in a thread")
    parser.add_argument("--growth", action="store_true", help="how streamed calibration grows instead")
    parser.add_argument("--limit", type=int, default=0)
    parser.add_argument("--dtype", default="float32", help="of the weights in memory")
    for field, value in vars(Shape()).items():
        parser.add_argument(f"--{field}", type=int, default=value)
    arguments = parser.parse_args(words)
    arguments.shape = Shape(**{field: getattr(arguments, field) for field in vars(Shape())})
    if arguments.growth:
        growth(arguments)
        return
    make_model(arguments.folder, arguments.shape)
    if arguments.work is None:
        compare(arguments)
    else:
        print(json.dumps(measure(arguments, arguments.shape)))


if __name__ == "__main__":
    main()
