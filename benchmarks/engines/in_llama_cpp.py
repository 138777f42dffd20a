"""Greedy answers of a checkpoint in llama.cpp, on the CPU.

    python in_llama_cpp.py FOLDER PROMPTS ANSWERS CONVERTER

CONVERTER is llama.cpp's folder with convert_hf_to_gguf.py. The converter knows how a tokenizer cuts text by a
hash of what the tokenizer makes of one long text, so it can know no vocabulary of 2048 tokens. The built-in
tokenizers cut as GPT-2's does, and the converter is told so.
"""

from __future__ import annotations

import json
import sys
from importlib.metadata import version
from pathlib import Path

import xllamacpp


def convert(folder: Path, converter: Path, file: Path) -> None:
    """Write a checkpoint as a GGUF file in float32."""
    sys.path[:0] = [str(converter), str(converter / "gguf-py")]
    import convert_hf_to_gguf
    from conversion.base import TextModel

    TextModel.get_vocab_base_pre = lambda *_: "gpt-2"
    sys.argv = ["convert_hf_to_gguf.py", str(folder), "--outfile", str(file), "--outtype", "f32"]
    convert_hf_to_gguf.main()


def main(folder: Path, prompts: Path, answers: Path, converter: Path) -> None:
    asked = json.loads(prompts.read_text())
    file = answers.with_suffix(".gguf")
    convert(folder, converter, file)
    params = xllamacpp.CommonParams()
    params.model.path = str(file)
    params.n_ctx, params.n_parallel, params.warmup = 512, 1, False
    params.cpuparams.n_threads = 1
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    # Its flash attention rounds to half precision, which moves log-probabilities by 3e-3.
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    server = xllamacpp.Server(params)
    found = []
    for ids in asked["prompts"]:
        request = {"prompt": ids, "n_predict": asked["new_tokens"], "temperature": 0, "logprobs": 1}
        parts = server.handle_completions(request)["choices"][0]["logprobs"]["content"]
        found.append(
            {"tokens": [part["id"] for part in parts], "logprobs": [part["logprob"] for part in parts]}
        )
    engine = f"xllamacpp {version('xllamacpp')}"
    answers.write_text(json.dumps({"engine": engine, "answers": found}))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
