"""Every form of a pruned checkpoint in every engine: `make engines`.

3 prompts and 24 greedy tokens each, compared with transformers in float32: how many tokens are the same, and
by how much their log-probabilities differ at the most. Builds the engines' environments (5 GB, minutes),
removes half of both built-in models in every form, and prints a Markdown table; exits with 1 if a token
differs.

    python benchmarks/engines/table.py [--models tiny] [--forms stock,ragged] [--engines vllm]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers import __version__ as transformers_version

sys.path.insert(0, str(Path(__file__).parent))
from environments import HERE, converter, python_of

ROOT = HERE.parents[1]
MODELS = ("tiny", "tiny_deepseek")
RAGGED, STOCK = ("per layer", "ragged"), ("stock", "masked")
FORMS = {
    "stock": ["recipe=stock"],
    "per layer": ["recipe=stock", "pruning.form=per_layer"],
    "masked": ["pruning.form=masked"],
    "ragged": [],
}
PROMPTS = ("Return the sum of", "Open the file and read", "The list of all keys")
NEW_TOKENS = 24
NO_CLASS = "no class for it"
TIMEOUT = 600  # seconds for one engine on one checkpoint

Answers = Mapping[str, Any]  # "engine", and "answers": "tokens" and "logprobs" of each prompt


class Engine(NamedTuple):
    """A column of the table."""

    name: str
    forms: Sequence[str]
    command: Callable[[], list[str]]
    more: Callable[[], list[str]] = list


def _script(environment: str) -> Callable[[], list[str]]:
    return lambda: [str(python_of(environment)), str(HERE / f"in_{environment}.py")]


ENGINES = {
    "vllm": Engine("vLLM", (*STOCK, *RAGGED), _script("vllm")),
    "vllm_compiled": Engine("vLLM, compiled", (*STOCK, *RAGGED), _script("vllm"), lambda: ["compiled"]),
    "llama_cpp": Engine("llama.cpp", STOCK, _script("llama_cpp"), lambda: [str(converter())]),
    "mlx": Engine("MLX", STOCK, _script("mlx")),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--forms", default=",".join(FORMS))
    parser.add_argument("--engines", default=",".join(ENGINES))
    asked = parser.parse_args()
    engines = [ENGINES[name] for name in asked.engines.split(",")]
    versions = {f"transformers {transformers_version}"}
    rows, is_good = [], True
    with tempfile.TemporaryDirectory() as temporary:
        for model, form in product(asked.models.split(","), asked.forms.split(",")):
            cells = []
            for cell, version in _row(model, form, engines, Path(temporary)):
                cells.append(cell)
                versions |= {version} if version else set()
                is_good &= cell.startswith((f"{NEW_TOKENS}/{NEW_TOKENS}", NO_CLASS))
            rows.append(f"| {model} | {form} | {' | '.join(cells)} |")
            print(rows[-1], flush=True)
    names = " | ".join(engine.name for engine in engines)
    print(f"\n| model | form | {names} |\n|{'---|' * (2 + len(engines))}")
    print("\n".join(rows), ", ".join(sorted(versions)), sep="\n\n")
    return 0 if is_good else 1


def _row(
    model: str, form: str, engines: Sequence[Engine], temporary: Path
) -> Iterator[tuple[str, str | None]]:
    """A cell and a version for each engine."""
    folder = prune(model, FORMS[form], temporary)
    expected = answers_of_transformers(folder)
    for engine in engines:
        if form in engine.forms:
            yield _compare(engine, folder, expected, temporary)
        else:
            yield NO_CLASS, None


def prune(model: str, overrides: Sequence[str], outputs: Path) -> Path:
    """A checkpoint of a built-in model with half of its atomic experts."""
    command = [sys.executable, "run.py", f"model={model}", *overrides, "pruning.ratio=0.5", "evaluation=none"]
    command += ["tracking=none", f"paths.outputs={outputs}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    said = [line for line in done.stdout.splitlines() if line.startswith("checkpoint:")]
    return Path(said[-1].partition(":")[2].strip())


def answers_of_transformers(folder: Path) -> Answers:
    """Token by token without a cache: the plainest way there is."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=True).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    prompts, answers = [tokenizer(text).input_ids for text in PROMPTS], []
    for prompt in prompts:
        ids, logprobs = list(prompt), []
        for _ in range(NEW_TOKENS):
            with torch.no_grad():
                logprob_V = model(input_ids=torch.tensor([ids])).logits[0, -1].log_softmax(dim=-1)
            ids.append(int(logprob_V.argmax()))
            logprobs.append(float(logprob_V.max()))
        answers.append({"tokens": ids[len(prompt) :], "logprobs": logprobs})
    return {"prompts": prompts, "new_tokens": NEW_TOKENS, "answers": answers}


def _compare(engine: Engine, folder: Path, expected: Answers, temporary: Path) -> tuple[str, str | None]:
    """What an engine makes of a checkpoint, in a cell of the table, and the engine's version."""
    prompts, answers = temporary / "prompts.json", temporary / "answers.json"
    answers.unlink(missing_ok=True)
    prompts.write_text(json.dumps({name: expected[name] for name in ("prompts", "new_tokens")}))
    command = [*engine.command(), str(folder), str(prompts), str(answers), *engine.more()]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""}
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=TIMEOUT, check=False, env=environment
    )
    if not answers.is_file():
        print(done.stdout[-3000:], done.stderr[-3000:], sep="\n", file=sys.stderr)
        return f"failed with {done.returncode}", None
    found = json.loads(answers.read_text())
    num_same, difference = [], 0.0
    for one, other in zip(expected["answers"], found["answers"], strict=True):
        pairs = zip(one["tokens"], other["tokens"], strict=False)
        num_same.append(sum(token == same for token, same in pairs))
        logprobs = zip(one["logprobs"], other["logprobs"], strict=False)
        difference = max([difference, *(abs(logprob - same) for logprob, same in logprobs)])
    return f"{min(num_same)}/{NEW_TOKENS}, {difference:.0e}", found["engine"]


if __name__ == "__main__":
    sys.exit(main())
