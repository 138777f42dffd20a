"""Memory that calibrating on a large file of JSON takes, beyond the interpreter's own.

Run:  python -m benchmarks.large_text [--gigabytes 1] [--form lines|array] [--folder <with space>]
It writes a file of random words, draws windows from it as a calibration does, and prints the peak memory
(Linux only).
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from pathlib import Path

from heapr.model.find_model import find_model
from heapr.text.corpora import TextFiles
from heapr.text.windows import draw

GIGABYTE, MEBIBYTE = 10**9, 2**20
WORDS_PER_DOCUMENT = (20, 300)
MAX_CHARACTERS = 20_000_000  # as in heapr/schema.py


def write_documents(path: Path, num_bytes: int, *, is_array: bool) -> int:
    """Write documents of random words, one a line, and return their number."""
    chance = random.Random(0)
    words = ["".join(chance.choices("etaoinshrdlu", k=chance.randint(2, 9))) for _ in range(5000)]
    num_written = number = 0
    comma = "," if is_array else ""
    with path.open("w") as file:
        file.write("[\n" if is_array else "")
        while num_written < num_bytes:
            text = " ".join(chance.choices(words, k=chance.randint(*WORDS_PER_DOCUMENT)))
            num_written += file.write(json.dumps({"id": number, "text": text}) + f"{comma}\n")
            number += 1
        file.write('{"text": "the last"}\n]\n' if is_array else "")
    return number


def resident(name: str) -> int:
    """Bytes of this process's memory: VmRSS now, VmHWM at most."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def main() -> None:
    parser = argparse.ArgumentParser(description="Memory of calibrating on a large file of JSON.")
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--form", choices=("lines", "array"), default="lines")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    options = parser.parse_args()
    tokenizer = find_model("builtin:qwen3_moe_tiny", dtype="float32").tokenizer
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        path = Path(folder) / "large.json"
        num_documents = write_documents(
            path, int(options.gigabytes * GIGABYTE), is_array=options.form == "array"
        )
        before = resident("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the peak from here on
        start = time.perf_counter()
        corpus = TextFiles([str(path)], split="all")
        corpus.identity()
        identified = time.perf_counter()
        draw(corpus, tokenizer, length=256, num_samples=128, seed=0, max_characters=MAX_CHARACTERS)
        end = time.perf_counter()
        peak = resident("VmHWM") - before
        size = path.stat().st_size / GIGABYTE
    print(f"{size:.2f} GB, {num_documents:,} documents")
    print(f"peak {peak / MEBIBYTE:.0f} MiB beyond the {before / MEBIBYTE:.0f} MiB before")
    print(f"identity {identified - start:.0f} s, windows {end - identified:.0f} s")


if __name__ == "__main__":
    main()
