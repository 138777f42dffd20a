"""Greedy answers of a checkpoint in mlx-lm, on the CPU: python in_mlx.py FOLDER PROMPTS ANSWERS."""

from __future__ import annotations

import json
import sys
from importlib.metadata import version
from pathlib import Path

import mlx.core as mx
from mlx_lm.utils import load_model


def main(folder: Path, prompts: Path, answers: Path) -> None:
    asked = json.loads(prompts.read_text())
    model, _ = load_model(folder)
    model.set_dtype(mx.float32)
    found = []
    for prompt in asked["prompts"]:
        ids, tokens, logprobs = list(prompt), [], []
        for _ in range(asked["new_tokens"]):
            logits = model(mx.array([ids]))[0, -1].astype(mx.float32)
            logprob = logits - mx.logsumexp(logits)
            token = int(mx.argmax(logprob))
            tokens.append(token)
            logprobs.append(float(logprob[token]))
            ids.append(token)
        found.append({"tokens": tokens, "logprobs": logprobs})
    engine = f"mlx {version('mlx')}, mlx-lm {version('mlx-lm')}"
    answers.write_text(json.dumps({"engine": engine, "answers": found}))


if __name__ == "__main__":
    mx.set_default_device(mx.cpu)
    main(*map(Path, sys.argv[1:]))
