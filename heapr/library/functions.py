"""heapr as a library: calibrate, score, prune and evaluate a transformers model that is in memory.

In: a model, its tokenizer, and texts or batches. Out: statistics, scores, metrics, a pruned model. No files,
and no configuration beyond keyword arguments. A run takes the same steps, with its results in files.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from heapr.calibration.collector import collect
from heapr.calibration.coverage import coverage_of, report_coverage
from heapr.errors import ConfigError
from heapr.evaluation.efficiency import count
from heapr.evaluation.perplexity import WINDOW_LOSSES, mean_losses, weighted_perplexity
from heapr.experiment import stock_settings
from heapr.findings import Findings
from heapr.library.given import Given, all_tokens, take_tokens, undisturbed, view_of
from heapr.library.options import PruningOptions, SamplingOptions, Settings, read_options
from heapr.library.pruned import Pruned
from heapr.model.checkpoint import check_form
from heapr.model.experts.dispatch import use_comparable_experts
from heapr.model.model_shape import ModelShape, shape_of
from heapr.model.moe import MoEModel
from heapr.model.ragged_type import take_ragged_type
from heapr.prepare import find_budget
from heapr.progress import progress
from heapr.provider import ModelProvider
from heapr.pruning.layer_repair import report_repair
from heapr.score.criterion import Criterion
from heapr.stages import Planning, layer_weights, log_report, super_experts_of
from heapr.steps import ratio_of_round, settings_of_plan
from heapr.text.corpora import Corpus
from heapr.text.mixture import Mixture
from heapr.types import Evaluation, Metrics, Pruning, Scores, Statistics

if TYPE_CHECKING:
    from typing_extensions import Unpack

logger = logging.getLogger(__name__)

# Documents; or batches of token ids (N, W), or of mappings with `input_ids`, `attention_mask` and `labels`.
TextsOrBatches = Iterable[Any] | Corpus | Mixture


def prune(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    texts: TextsOrBatches,
    *,
    ratio: float = 0.25,
    recipe: str | None = "stock",
    **options: Unpack[PruningOptions],
) -> Pruned:
    """Prune a Mixture-of-Experts model in place.

    Keep `copy.deepcopy(model)` if the dense model is still needed. If pruning fails in the middle, the model
    is left as it is then.

    Args:
        model: a causal language model of transformers, with all weights in memory.
        tokenizer: of the model. None if `texts` are batches; the checkpoint then has no tokenizer.
        texts: to calibrate on: documents as strings, a corpus of heapr's, or a data loader's batches: token
            ids (N, W), or mappings with `input_ids`, and perhaps `attention_mask` (padding counts nowhere)
            and `labels` (-100 where nothing is predicted).
        ratio: share of the routed atomic experts that is removed, in [0, 1).
        recipe: stock (one width, the family's own class), best or heapr (the paper's): conf/recipe. None
            stands for heapr, to be changed by options.
        options: see `PruningOptions`; each replaces the recipe's choice.

    Raises:
        ConfigError: a mistake, told in one line, nearly always before the model is changed.
        FloatingPointError: NaN or infinity; the message says where.
    """
    settings = read_options({"ratio": ratio, "recipe": recipe, **options})
    with undisturbed(model):
        view = view_of(model)
        shape = ModelShape(config=copy.deepcopy(model.config), dtype=model.dtype, **shape_of(model))
        run = _Pruning(view, shape, settings)
        given = take_tokens(view, tokenizer, texts, settings)
        held_out = options.get("evaluate_on")
        if held_out is not None:
            window, size = settings.calibration.sequence_length, settings.calibration.batch_size
            run.held_out = all_tokens(view, tokenizer, held_out, window=window, batch_size=size)
        return run.prune(given, tokenizer)


def calibrate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    texts: TextsOrBatches,
    **options: Unpack[SamplingOptions],
) -> Statistics:
    """The statistics of every atomic expert, from one forward and one backward pass. The model is unchanged.

    Args:
        model, tokenizer, texts: as for `prune`.
        options: see `SamplingOptions`.

    Returns:
        sums over the routed tokens, float64, on the CPU.

    Raises:
        ConfigError, FloatingPointError: as for `prune`.
    """
    settings = read_options(options, SamplingOptions)
    with undisturbed(model):
        view = view_of(model)
        return _calibrated(view, take_tokens(view, tokenizer, texts, settings))


def score(model: PreTrainedModel, statistics: Statistics, criterion: str | Criterion = "heapr") -> Scores:
    """The importance of every atomic expert, float32 (E, F) by decoder layer index; bigger is more important.

    Args:
        model: that the statistics are of. It is unchanged.
        statistics: from `calibrate`.
        criterion: name of an option of conf/score, or a `Criterion`.

    Raises:
        ConfigError: there is no such criterion, the model cannot be served, or the statistics are of another.
    """
    settings = read_options({"recipe": None, "score": criterion})
    if not isinstance(statistics, Statistics):
        raise ConfigError(f"statistics is a {type(statistics).__name__}; give what heapr.calibrate returned")
    with undisturbed(model):
        view = view_of(model)
        of_model = {layer.index: (layer.num_experts, max(layer.widths)) for layer in view.layers}
        given = {index: tuple(layer.h_sq_sum_EF.shape) for index, layer in statistics.layers.items()}
        if given != of_model:
            raise ConfigError(
                f"the statistics are of another model: experts and atomic experts by layer are {given},"
                f" and the model has {of_model}; calibrate this model"
            )
        return settings.criterion(statistics, partial(layer_weights, lambda: view))


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    texts: TextsOrBatches,
    *,
    window: int = 256,
    batch_size: int = 8,
) -> Metrics:
    """Perplexity, dense or pruned: exp(mean next-token cross-entropy). The model is unchanged.

    Args:
        model, tokenizer, texts: as for `prune`. Texts are joined by blank lines and cut into windows; the
            first token of each is not predicted, and the remainder is dropped.
        window: tokens of a window, at least 2.
        batch_size: windows per forward pass.

    Returns:
        `perplexity/<name>` and `num_tokens/<name>`; the name is "texts", "batches", or the corpus's own.

    Raises:
        ConfigError, FloatingPointError: as for `prune`.
    """
    read_options({"sequence_length": window, "batch_size": batch_size}, SamplingOptions)  # checks them
    with undisturbed(model):
        view = view_of(model)
        tokens = all_tokens(view, tokenizer, texts, window=window, batch_size=batch_size)
        return _measured(view, tokens).metrics


class _Pruning:
    """One model on its way through the rounds of pruning.

    Args:
        view: the dense model.
        shape: its shape.
        settings: what is done to it.

    Attributes:
        held_out: what both models are measured on; None measures only sizes.

    Raises:
        ConfigError: the model cannot be pruned like this.
    """

    def __init__(self, view: MoEModel, shape: ModelShape, settings: Settings) -> None:
        self._shape, self._settings = shape, settings
        pruning = settings.pruning
        self._budget = find_budget(pruning, shape, settings.criterion)
        stock = stock_settings(self._budget, shape.config)
        check_form(shape.config, pruning.form)
        self.held_out: Given | None = None
        dense = [view]
        if pruning.form == "masked" and (settings.repair is not None or pruning.rounds > 1):
            # Rounds and repair cut a copy, and then the model gets its zeros.
            dense.insert(0, MoEModel(copy.deepcopy(view.model)))
        self._models = ModelProvider(
            partial(dense.pop, 0), repair=settings.repair, form=pruning.form, stock_settings=stock
        )
        self._models.dense()  # refuses what the repair cannot serve

    def prune(self, given: Given, tokenizer: PreTrainedTokenizerBase | None) -> Pruned:
        """Go through all rounds."""
        statistics = _calibrated(self._models.dense(), given)
        report_coverage(coverage_of(statistics, self._shape.widths))
        findings = Findings([])
        self._measure(findings, "dense", self._models.dense(), statistics)
        pruning = self._rounds(given, statistics)
        final = self._models.final(pruning)
        self._measure(findings, "pruned", final, statistics)
        kept_ratio = pruning.plan.num_kept / self._shape.num_atomic_experts
        metrics = findings.conclude(findings.measured("dense"), kept_ratio)
        if final.is_ragged:
            widths = {layer.name: layer.widths for layer in final.layers}
            take_ragged_type(final.model, widths)
        about = self._about(given, kept_ratio)
        config = self._shape.config
        return Pruned(final.model, pruning.plan, metrics, statistics, about, tokenizer, config)

    def _rounds(self, given: Given, first: Statistics) -> Pruning:
        """Score, plan and repair; from the second round on, calibrate on what the round before left."""
        settings = self._settings
        found = super_experts_of(self._models.dense(), first)
        protects = settings.pruning.protect_super_experts
        planning = Planning(self._shape, self._budget, first, found, protects)
        done: Pruning | None = None
        for number in range(1, settings.pruning.rounds + 1):
            model = self._models.dense() if done is None else self._models.pruned(done)
            statistics = first if done is None else _calibrated(model, given)
            scores = settings.criterion(statistics, partial(layer_weights, _returns(model)))
            del model
            ratio = ratio_of_round(settings.pruning, number)
            plan, report = planning.plan(scores, ratio, done.plan if done else None)
            log_report(report)
            if settings.repair is None:
                done = Pruning(plan)
                continue
            done, repaired = self._models.repaired(plan, done, partial(_ids, given))
            log_report(report_repair(repaired))
        assert done is not None
        return done

    def _measure(self, findings: Findings, variant: str, model: MoEModel, statistics: Statistics) -> None:
        with use_comparable_experts(model.model):
            findings.add(
                variant, Evaluation(count(model, statistics, self._settings.calibration.sequence_length))
            )
            if self.held_out is not None:
                findings.add(variant, _measured(model, self.held_out))

    def _about(self, given: Given, kept_ratio: float) -> dict[str, Any]:
        """What was done, as a run says it in the checkpoint's config.json and card."""
        settings, config = self._settings, self._shape.config
        width = {} if self._budget.uniform_width is None else {"width": self._budget.uniform_width}
        about = {
            "model": config.name_or_path or str(config.model_type),
            "criterion": settings.score,
            "calibration": {
                "corpus": given.identity,
                "num_samples": given.num_sequences,
                "sequence_length": given.longest,
                "seed": settings.calibration.seed,
            },
            **settings_of_plan(settings.pruning),
            **width,
            "rounds": settings.pruning.rounds,
        }
        if self._budget.unit == "atomic_experts":
            about["ratio_reached"] = 1 - kept_ratio
        return about


def _calibrated(model: MoEModel, given: Given) -> Statistics:
    """Statistics on the CPU, where criteria expect them."""
    bar = progress(given.batches, total=len(given.batches), description="calibrate")
    statistics = collect(model, bar)
    return Statistics.from_tensors(statistics.to_tensors())


def _measured(model: MoEModel, given: Given) -> Evaluation:
    name = f"perplexity/{given.name}"
    with use_comparable_experts(model.model):
        losses = mean_losses(model, given.batches, name)
    numbers = [number for batch in given.batches for number in batch.num_predicted.tolist()]
    metrics = {name: weighted_perplexity(losses, numbers), f"num_tokens/{given.name}": given.num_tokens}
    are_comparable = len(set(numbers)) == 1  # the increase's standard error is over windows of one length
    return Evaluation(metrics, {WINDOW_LOSSES: {given.name: losses}} if are_comparable else {})


def _ids(given: Given) -> Sequence[Tensor]:
    return [batch.ids_NW for batch in given.batches]


def _returns(model: MoEModel) -> Callable[[], MoEModel]:
    return lambda: model
