"""What a model writes after prompts, and numbers that describe it.

In: a model and prompts of one length, so that nothing is padded. Out: token ids, one list for each prompt.
Shape letters: N prompts, W tokens of a prompt, V vocabulary.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from heapr.errors import ConfigError
from heapr.model.experts.dispatch import exchanged
from heapr.model.moe import MoEModel

Continuation = list[int]  # token ids, without the end token

MIN_LOOP = 16  # tokens
MIN_REPEATS = 3
NGRAM = 3  # tokens


def is_loop(tokens: Sequence[int]) -> bool:
    """Whether a continuation ends in repetition.

    It does if, for some period p, its last max(MIN_LOOP, MIN_REPEATS * p) tokens are periodic: each of them
    but the first p equals the one p places before it.
    """
    for period in range(1, len(tokens) // MIN_REPEATS + 1):
        length = max(MIN_LOOP, MIN_REPEATS * period)
        if length > len(tokens):
            continue
        tail = list(tokens[-length:])
        if tail[period:] == tail[:-period]:
            return True
    return False


def distinct_ratio(tokens: Sequence[int]) -> float | None:
    """Share of a continuation's n-grams (n = NGRAM) that are distinct, in (0, 1]; None if it has none."""
    num_ngrams = len(tokens) - NGRAM + 1
    if num_ngrams < 1:
        return None
    ngrams = {tuple(tokens[start : start + NGRAM]) for start in range(num_ngrams)}
    return len(ngrams) / num_ngrams


def uniforms(seed: int, prompt: int, num_tokens: int) -> list[float]:
    """Numbers in [0, 1) that decide what is sampled after one prompt, whatever is in its batch."""
    generator = random.Random(f"{seed} {prompt}")
    return [generator.random() for _ in range(num_tokens)]


@torch.inference_mode()
def continuations(
    model: MoEModel,
    prompts_NW: Tensor,
    num_tokens: int,
    *,
    uniform_NT: Tensor | None = None,
    temperature: float = 1.0,
) -> list[Continuation]:
    """Continue prompts by transformers' `generate`, with the cache of the model's family.

    Nothing but the logits decides: the model's own generation settings, such as a penalty for repetitions,
    are not used. Only its end tokens are.

    Args:
        model: with all layers in memory.
        prompts_NW: token ids, int64.
        num_tokens: where a continuation is cut off if it has not ended, at least 1.
        uniform_NT: numbers in [0, 1), float64: the token of step t is the first v for which the cumulative
            probability of the tokens 0 to v is above number t. None takes the most probable token.
        temperature: by which logits are divided if tokens are sampled, above 0.

    Raises:
        ConfigError: the model's class cannot generate.
        FloatingPointError: a logit is NaN.
    """
    if not model.model.can_generate():
        raise ConfigError(
            f"{type(model.model).__name__} cannot generate text, because its class has no `generate`; give"
            " evaluation.generation=null"
        )
    end_ids = end_tokens(model)
    settings = GenerationConfig(
        do_sample=False,
        use_cache=True,
        max_new_tokens=num_tokens,
        eos_token_id=end_ids or None,
        pad_token_id=end_ids[0] if end_ids else None,
    )
    choice = _Choice(prompts_NW.shape[1], uniform_NT, temperature)
    # `generate` takes from the model's own settings whatever is not given.
    with exchanged([(model.model, "generation_config", GenerationConfig())]):
        ids_NW = model.model.generate(  # type: ignore[operator]
            prompts_NW,
            attention_mask=torch.ones_like(prompts_NW),
            generation_config=settings,
            logits_processor=LogitsProcessorList([choice]),
        )
    rows = ids_NW[:, prompts_NW.shape[1] :].tolist()
    return [_until_end(row, end_ids) for row in rows]


def end_tokens(model: MoEModel) -> list[int]:
    """Ids of the tokens that end a text: those of the generation settings, else of the configuration."""
    settings = getattr(model.model, "generation_config", None)
    declared = getattr(settings, "eos_token_id", None)
    if declared is None:
        declared = getattr(model.model.config.get_text_config(), "eos_token_id", None)
    if declared is None:
        return []
    return list(declared) if isinstance(declared, list | tuple) else [int(declared)]


class _Choice(LogitsProcessor):  # type: ignore[misc]
    """Chooses the next token: leaves the scores as they are, or leaves only the sampled token possible."""

    def __init__(self, prompt_length: int, uniform_NT: Tensor | None, temperature: float) -> None:
        self._prompt_length = prompt_length
        self._uniform_NT = uniform_NT
        self._temperature = temperature

    def __call__(self, ids_NW: Tensor, scores_NV: Tensor) -> Tensor:
        if scores_NV.isnan().any():
            raise FloatingPointError("a logit is NaN")
        if self._uniform_NT is None:
            return scores_NV
        step = ids_NW.shape[1] - self._prompt_length
        uniform_N1 = self._uniform_NT[:, step : step + 1].to(scores_NV.device)
        probability_NV = (scores_NV.double() / self._temperature).softmax(dim=-1)
        cumulative_NV = probability_NV.cumsum(dim=-1)
        # The last sum is 1 up to rounding.
        threshold_N1 = uniform_N1 * cumulative_NV[:, -1:]
        token_N1 = torch.searchsorted(cumulative_NV, threshold_N1, right=True)
        return torch.full_like(scores_NV, -torch.inf).scatter(1, token_N1, 0.0)


def _until_end(row: Sequence[int], end_ids: Sequence[int]) -> Continuation:
    """The tokens before the first end token."""
    for place, token in enumerate(row):
        if token in end_ids:
            return list(row[:place])
    return list(row)
