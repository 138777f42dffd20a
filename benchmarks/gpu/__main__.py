"""Everything that is measured on a GPU, in one command of less than 8 minutes.

Run:  make gpu, or: python -m benchmarks.gpu --wheels FOLDER
      in the repository; needs torch, transformers and pytest, and Triton for the kernel. It installs nothing:
      what else is missing is taken from a folder of wheels of pure Python.
Out:  one table, measured beside predicted (PREDICTIONS.md), and benchmarks/results/gpu_<card>.json. Without
      a GPU everything runs with toy shapes, which show that nothing breaks; no file is written then.

Each part is a process of its own with a time limit, so that one failure does not cost the rest.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

# In order, with the most seconds each may take.
PARTS = {
    "marked": 90,
    "scores": 45,
    "calibration": 120,
    "layers": 70,
    "ragged": 40,
    "repair": 70,
    "streamed": 40,
}
RESULTS = Path(__file__).parents[1] / "results"
ROWS = "rows: "  # before a part's result, which is its last line


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", default=",".join(PARTS), help="some of: %(default)s")
    parser.add_argument("--toy", action="store_true", help="toy shapes on the CPU, even if there is a GPU")
    parser.add_argument("--wheels", type=Path, help="folder of wheels whose packages are missing here")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for the file; %(default)s")
    parser.add_argument("--in-process", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.in_process:
        return _measure(arguments.parts, toy=arguments.toy)
    import torch

    toy = arguments.toy or not torch.cuda.is_available()
    card = "toy" if toy else torch.cuda.get_device_name()
    print(
        f"{card}, torch {torch.__version__}{', toy shapes: figures mean nothing' if toy else ''}", flush=True
    )
    found = {}
    for part in arguments.parts.split(","):
        found[part] = run_part(_command(part, toy=toy), limit=PARTS[part], wheels=arguments.wheels)
        print(f"{part}: {found[part]['seconds']:.0f} s, {found[part]['outcome']}", flush=True)
    _report(found)
    if not toy:
        _write(arguments.results, card, found)
    return int(any(result["outcome"] != "done" for result in found.values()))


def run_part(command: list[str], *, limit: float, wheels: Path | None = None) -> dict[str, Any]:
    """A process of its own that is ended, with all that it started, when its time is over."""
    environment = dict(os.environ)
    if wheels is not None:
        paths = [str(path) for path in sorted(wheels.glob("*.whl"))]
        environment["PYTHONPATH"] = os.pathsep.join([*paths, environment.get("PYTHONPATH", "")])
    started = time.perf_counter()
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env=environment, start_new_session=True
    )
    try:
        output, _ = process.communicate(timeout=limit)
        outcome = "done" if process.returncode == 0 else f"failed with code {process.returncode}"
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        outcome = f"stopped after {limit} s"
    lines = [line.removeprefix(ROWS) for line in output.splitlines() if line.startswith(ROWS)]
    rows = json.loads(lines[-1]) if lines else []
    return {"outcome": outcome, "seconds": time.perf_counter() - started, "rows": rows}


def _command(part: str, *, toy: bool) -> list[str]:
    command = [sys.executable, "-m", "benchmarks.gpu", "--in-process", "--parts", part]
    return [*command, "--toy"] if toy else command


def _measure(part: str, *, toy: bool) -> int:
    """Run one part here; its rows are the last line of the output."""
    import torch

    from benchmarks.gpu.shapes import TOY, Shapes

    device = torch.device("cpu" if toy else "cuda")
    rows = importlib.import_module(f"benchmarks.gpu.{part}").measure(TOY if toy else Shapes(), device)
    print(ROWS + json.dumps([row.as_dict() for row in rows]), flush=True)
    return 0


def _report(found: dict[str, dict[str, Any]]) -> None:
    from benchmarks.gpu.rows import Row, table

    rows = [Row(**row) for result in found.values() for row in result["rows"]]
    print(table(rows))


def _write(folder: Path, card: str, found: dict[str, dict[str, Any]]) -> None:
    import torch
    import transformers

    about = {"card": card, "torch": torch.__version__, "transformers": transformers.__version__}
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"gpu_{re.sub(r'[^a-z0-9]+', '_', card.lower())}.json"
    path.write_text(json.dumps(about | {"parts": found}, indent=2) + "\n")
    print(path)


if __name__ == "__main__":
    sys.exit(main())
