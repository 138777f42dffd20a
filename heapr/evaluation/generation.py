"""Generation: how a model continues held-out text of one corpus, greedily and sampled.

In: a model and a corpus. Out: loop rate, length and distinct n-grams of its continuations. From the
continuations of two models: how often they agree, and how much more the second one loops.
Shape letters: N prompts, W tokens of a window, T steps.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import chain
from statistics import fmean, stdev
from typing import Annotated, Any

import torch
from annotated_types import Ge, Gt
from torch import Tensor

from heapr.errors import ConfigError
from heapr.evaluation.continuations import (
    MIN_LOOP,
    MIN_REPEATS,
    NGRAM,
    Continuation,
    continuations,
    distinct_ratio,
    is_loop,
    uniforms,
)
from heapr.evaluation.measurement import Material, Need
from heapr.model.load import ModelSource
from heapr.model.moe import MoEModel
from heapr.progress import progress
from heapr.text.corpora import Corpus
from heapr.text.tokenizing import special_ids
from heapr.text.windows import cut, tokenize
from heapr.types import Evaluation, Metrics, ProtocolRecord

GREEDY = "greedy"
WAYS = (GREEDY, "sampled")
CONTINUATIONS = "continuations"  # key in the details of the evaluation
Numbers = Sequence[float]  # one for each prompt


class Generation:
    """Continues prompts from a corpus, by the most probable tokens (greedy) and by sampled ones.

    A prompt is `prompt_length` consecutive tokens, behind the tokens that the tokenizer puts before a text.
    All have the same length, so nothing is padded. Metrics, as means over the prompts, with their standard
    errors `<metric>_stderr/<corpus>`, for <way> greedy and sampled:

    - `loop_rate_<way>/<corpus>`: share of continuations that end in repetition (see `is_loop`).
    - `length_<way>/<corpus>`: tokens before the end token, or `new_tokens` if there is none.
    - `distinct_ngrams_<way>/<corpus>`: share of a continuation's 3-grams that are distinct.

    What is sampled after a prompt depends on the seed, the prompt's number and the logits. Both models use
    the same random numbers.

    Args:
        corpus: the text.
        num_prompts: evenly spread over the corpus, at least 2; fewer if the corpus is short.
        prompt_length: tokens, at least 1.
        new_tokens: where a continuation is cut off, at least 16 (a shorter one cannot be a loop).
        batch_size: prompts at once, at least 1. Changes the result only where rounding decides between two
            tokens.
        temperature: of the sampling, above 0.
        seed: of the sampling.
        agreed_tokens: two greedy continuations agree if their first `agreed_tokens` tokens are the same.

    Raises:
        ConfigError: agreed_tokens is above new_tokens.
    """

    needs = frozenset({Need.MODEL, Need.CORPUS})

    def __init__(  # noqa: PLR0913 - the options of a configuration
        self,
        corpus: Corpus,
        *,
        num_prompts: Annotated[int, Ge(2)],
        prompt_length: Annotated[int, Ge(1)],
        new_tokens: Annotated[int, Ge(MIN_LOOP)],
        batch_size: Annotated[int, Ge(1)],
        temperature: Annotated[float, Gt(0)],
        seed: Annotated[int, Ge(0)],
        agreed_tokens: Annotated[int, Ge(1)],
    ) -> None:
        self.corpus = corpus
        self.num_prompts, self.prompt_length = num_prompts, prompt_length
        self.new_tokens, self.batch_size = new_tokens, batch_size
        self.temperature, self.seed = temperature, seed
        self.agreed_tokens = agreed_tokens
        self.name = f"generation/{corpus.name}"
        loop_rates = [
            f"{name}_{way}/{corpus.name}" for name in ("loop_rate", "loop_rate_increase") for way in WAYS
        ]
        self.objectives = (f"greedy_agreement/{corpus.name}", *loop_rates)
        self._windows_NW: Tensor | None = None
        self._special_tokens: list[str] = []
        if agreed_tokens > new_tokens:
            raise ConfigError(
                f"evaluation.generation.agreed_tokens={agreed_tokens} is above new_tokens={new_tokens}; make"
                " it smaller"
            )

    def identity(self) -> dict[str, Any]:
        return {
            "evaluator": "generation",
            "name": self.name,
            "corpus": self.corpus.identity(),
            "num_prompts": self.num_prompts,
            "prompt_length": self.prompt_length,
            "new_tokens": self.new_tokens,
            "temperature": self.temperature,
            "seed": self.seed,
            "agreed_tokens": self.agreed_tokens,
            "loop": {"tokens": MIN_LOOP, "repeats": MIN_REPEATS},
            "ngram": NGRAM,
        }

    def prepare(self, source: ModelSource) -> None:
        """Cut prompts, each with the text that follows it.

        Raises:
            ConfigError: the text is too short, or prompt and continuation are too long for the model.
        """
        tokenizer, limit = source.tokenizer, source.max_sequence_length
        before, behind = special_ids(tokenizer) or ([], [])
        length = self.prompt_length + self.new_tokens
        if limit is not None and len(before) + length > limit:
            raise ConfigError(
                f"evaluation.generation.prompt_length + new_tokens = {length} is above the model's limit of"
                f" {limit - len(before)} tokens; make one of them smaller"
            )
        tokens_T = tokenize(self.corpus, tokenizer)
        plain_T = tokens_T[len(before) : len(tokens_T) - len(behind)]
        windows_NW = cut(plain_T, self.corpus, length).ids_NW.long()
        available = len(windows_NW)
        number = min(available, self.num_prompts)
        chosen_N = torch.arange(number) * available // number
        before_NW = torch.tensor(before, dtype=torch.int64).expand(number, -1)
        self._windows_NW = torch.cat([before_NW, windows_NW[chosen_N]], dim=1)
        self._special_tokens = [str(token) for token in tokenizer.convert_ids_to_tokens(before)]

    def refuse_generation(self) -> None:
        """Refuse to generate text, token after token, with a streamed model.

        Raises:
            ConfigError: always.
        """
        raise ConfigError(
            f"{self.name} generates text, and a streamed model would be read from the disk once for every"
            " token; give evaluation.generation=null or runtime.stream=false"
        )

    def __call__(self, material: Material) -> Evaluation:
        assert self._windows_NW is not None, "prepare() comes first"
        model, ranks = material.model(), material.ranks
        prompts_NW = self._windows_NW[:, : -self.new_tokens]
        uniform_NT = self._uniform_numbers(len(prompts_NW))
        batches = zip(prompts_NW.split(self.batch_size), uniform_NT.split(self.batch_size), strict=True)
        shared = ranks.share(batches)
        of_batches: list[list[list[Continuation]]] = []
        for place, batch in enumerate(progress(shared, total=len(shared), description=self.name)):
            of_batches.append(self._both_ways(model, batch, number=ranks.number(place)))
        of_prompts = list(chain.from_iterable(ranks.in_order(of_batches)))
        written: dict[str, list[Continuation]] = {}
        for number, way in enumerate(WAYS):
            written[way] = [both[number] for both in of_prompts]
        metrics: Metrics = {}
        for way, texts in written.items():
            metrics |= self._metrics(way, texts)
        of_text = self._metrics("text", self._windows_NW[:, -self.new_tokens :].tolist())
        details = {
            "protocols": {self.name: self._protocol(len(prompts_NW))},
            "of_the_text_itself": of_text,
            CONTINUATIONS: {self.corpus.name: {"agreed_tokens": self.agreed_tokens, **written}},
        }
        return Evaluation(metrics, details)

    def _uniform_numbers(self, num_prompts: int) -> Tensor:
        rows = [uniforms(self.seed, number, self.new_tokens) for number in range(num_prompts)]
        return torch.tensor(rows, dtype=torch.float64)

    def _both_ways(
        self, model: MoEModel, batch: tuple[Tensor, Tensor], *, number: int
    ) -> list[list[Continuation]]:
        """For each prompt the greedy and the sampled continuation.

        Args:
            model: dense or pruned.
            batch: prompts (N, W), and uniform numbers (N, T) for the sampling.
            number: of the batch, for messages.
        """
        prompts_NW = batch[0].to(model.device)
        write = partial(continuations, model, prompts_NW, self.new_tokens)
        try:
            greedy = write()
            sampled = write(uniform_NT=batch[1], temperature=self.temperature)
        except FloatingPointError as error:
            problem = f"{self.name}: {error} in batch {number}"
            raise FloatingPointError(f"{problem}; use a wider model.dtype") from error
        return [list(both) for both in zip(greedy, sampled, strict=True)]

    def _metrics(self, way: str, texts: Sequence[Continuation]) -> Metrics:
        ratios = [distinct_ratio(text) for text in texts]
        values: dict[str, Numbers] = {
            "loop_rate": [float(is_loop(text)) for text in texts],
            "length": [float(len(text)) for text in texts],
            "distinct_ngrams": [ratio for ratio in ratios if ratio is not None],
        }
        metrics: Metrics = {}
        for name, numbers in values.items():
            metrics |= mean_and_error(f"{name}_{way}", self.corpus.name, numbers)
        return metrics

    def _protocol(self, num_prompts: int) -> ProtocolRecord:
        """What must be equal for two results to be comparable."""
        settings = {
            name: value for name, value in self.identity().items() if name not in ("name", "evaluator")
        }
        return {**settings, "num_prompts": num_prompts, "special_tokens": self._special_tokens}


def mean_and_error(name: str, corpus: str, numbers: Numbers) -> Metrics:
    """`<name>/<corpus>`, the mean, and `<name>_stderr/<corpus>`, its standard error s / sqrt(N).

    There is no error for one number, and nothing for none.
    """
    if not numbers:
        return {}
    metrics: Metrics = {f"{name}/{corpus}": fmean(numbers)}
    if len(numbers) > 1:
        metrics[f"{name}_stderr/{corpus}"] = stdev(numbers) / math.sqrt(len(numbers))
    return metrics


def compare_continuations(dense: Mapping[str, Any], pruned: Mapping[str, Any]) -> Metrics:
    """Compare what two models wrote after the same prompts.

    - `greedy_agreement/<corpus>`: share of the prompts after which the first tokens of both greedy
      continuations are the same; one that ends earlier agrees only with one that ends there too.
    - `loop_rate_increase_<way>/<corpus>`: loop rate of the pruned model - that of the dense one.

    With standard errors; those of the increases are of paired prompts.

    Args:
        dense, pruned: details of the evaluations under `CONTINUATIONS`, by corpus.
    """
    metrics: Metrics = {}
    for corpus in dense.keys() & pruned.keys():
        before, after = dense[corpus], pruned[corpus]
        first = before["agreed_tokens"]
        pairs = zip(before[GREEDY], after[GREEDY], strict=True)
        agreements = [float(one[:first] == other[:first]) for one, other in pairs]
        metrics |= mean_and_error("greedy_agreement", corpus, agreements)
        for way in WAYS:
            pairs = zip(before[way], after[way], strict=True)
            increases = [float(is_loop(other)) - float(is_loop(one)) for one, other in pairs]
            metrics |= mean_and_error(f"loop_rate_increase_{way}", corpus, increases)
    return dict(sorted(metrics.items()))
