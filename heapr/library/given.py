"""What users of the library give: a model, a tokenizer, and texts or batches.

In: anything. Out: a `MoEModel`, and batches of token ids; or one line that says what to give instead.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from heapr.errors import ConfigError
from heapr.library.options import Settings
from heapr.model.moe import MoEModel
from heapr.schema import DTYPES
from heapr.text.corpora import Corpus
from heapr.text.in_memory import Texts
from heapr.text.loader import check_ids, read_batches
from heapr.text.mixture import Mixture
from heapr.text.windows import batches, draw, windows
from heapr.types import Batch

ORDER = "the order is model, tokenizer, texts"


@dataclass(frozen=True)
class Given:
    """Tokens to calibrate or to measure on.

    Attributes:
        batches: of sequences without padding.
        identity: what the text is, in JSON types, for the checkpoint's card.
        name: for metrics.
    """

    batches: Sequence[Batch]
    identity: dict[str, Any]
    name: str

    @property
    def num_sequences(self) -> int:
        return sum(len(batch.ids_NW) for batch in self.batches)

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence."""
        return max(batch.ids_NW.shape[1] for batch in self.batches)

    @property
    def num_tokens(self) -> int:
        return sum(batch.ids_NW.numel() for batch in self.batches)


def view_of(model: PreTrainedModel) -> MoEModel:
    """The view of a model in memory.

    Raises:
        ConfigError: it is no such model, or heapr cannot serve it.
    """
    if not isinstance(model, PreTrainedModel):
        what = f"model is a {type(model).__name__}, not a model of transformers"
        hint = ORDER
        if isinstance(model, str | Path):
            hint = "load it first: AutoModelForCausalLM.from_pretrained(...)"
        elif isinstance(model, nn.Module):
            hint = (
                "give the model inside (of a compiled one ._orig_mod, of a parallel one .module, of one with"
                " adapters .merge_and_unload())"
            )
        raise ConfigError(f"{what}; {hint}")
    name = type(model).__name__
    quantization = getattr(model.config, "quantization_config", None)
    if quantization is not None or getattr(model, "hf_quantizer", None) is not None:
        raise ConfigError(f"{name} is quantised, and gradients need whole weights; load it unquantised")
    if model.get_output_embeddings() is None:
        raise ConfigError(f"{name} has no output head; load it with AutoModelForCausalLM")
    if any(tensor.is_meta for tensor in chain(model.parameters(), model.buffers())):
        raise ConfigError(
            f"{name} has weights on the meta device or offloaded; load all of them into memory, or use the"
            " command, which reads one layer at a time: heapr model=hf model.path=... runtime.stream=true"
        )
    view = MoEModel(model)
    dtype = str(view.layers[0].experts.down_proj.dtype).removeprefix("torch.")
    if dtype not in DTYPES:
        raise ConfigError(f"{name} has experts of dtype {dtype}; load it as one of {', '.join(DTYPES)}")
    view.check_head()
    return view


@contextmanager
def undisturbed(model: Any) -> Iterator[None]:
    """Inside the context gradients can be computed, and dropout is off; the model's mode is restored.

    What the context does to the experts leaves them trainable only if they were.
    """
    if not isinstance(model, PreTrainedModel):
        yield  # which is refused
        return
    modes = {module: module.training for module in model.modules()}
    trains = any(parameter.requires_grad for parameter in model.parameters())
    known = {id(parameter) for parameter in model.parameters()}
    try:
        with torch.inference_mode(False), torch.enable_grad():
            yield
    finally:
        for module in model.modules():
            module.training = modes.get(module, modes[model])
        for parameter in model.parameters():
            if id(parameter) not in known:
                parameter.requires_grad_(trains)


def take_tokens(view: MoEModel, tokenizer: Any, texts: Any, settings: Settings) -> Given:
    """The tokens to calibrate on.

    Raises:
        ConfigError: there are too few, or something else was given.
    """
    calibration = settings.calibration
    is_batches, source = _source(texts)
    if is_batches:
        limit = calibration.num_samples if "num_samples" in settings.is_given else None
        size = calibration.batch_size if "batch_size" in settings.is_given else None
        return _of_loader(view, source, limit=limit, size=size)
    _check_length(view, calibration.sequence_length, "sequence_length")
    drawn = draw(
        source,
        _tokenizer(tokenizer),
        length=calibration.sequence_length,
        num_samples=calibration.num_samples,
        seed=calibration.seed,
        max_characters=calibration.max_characters,
    )
    return _of_windows(view, source, batches(drawn, calibration.batch_size))


def all_tokens(view: MoEModel, tokenizer: Any, texts: Any, *, window: int, batch_size: int) -> Given:
    """The tokens to measure on: all windows of the texts, or all batches.

    Raises:
        ConfigError: there is less than a window, or something else was given.
    """
    is_batches, source = _source(texts)
    if is_batches:
        return _of_loader(view, source)
    _check_length(view, window, "window")
    cut = windows(source, _tokenizer(tokenizer), length=window)
    return _of_windows(view, source, batches(cut, batch_size))


def _of_loader(
    view: MoEModel, loader: Iterable[Any], *, limit: int | None = None, size: int | None = None
) -> Given:
    read = read_batches(loader, num_tokens=_num_embeddings(view), limit=limit, batch_size=size)
    given = Given(read, {"corpus": "batches", "split": "all"}, "batches")
    _check_length(view, given.longest, "a sequence of")
    return given


def _of_windows(view: MoEModel, source: Corpus | Mixture, cut: Iterable[Tensor]) -> Given:
    whole = [Batch.of(ids_NW) for ids_NW in cut]
    given = Given(whole, source.identity(), source.name)
    for batch in given.batches:
        check_ids(batch.ids_NW, _num_embeddings(view), f"'{source.name}'")
    return given


def _source(texts: Any) -> tuple[bool, Any]:
    """Whether batches were given, and the batches or the corpus.

    Raises:
        ConfigError: neither was given.
    """
    if isinstance(texts, Corpus | Mixture):
        return False, texts
    if isinstance(texts, str | bytes):
        raise ConfigError("texts is one string; give a list of documents, for example [text]")
    if isinstance(texts, Path):
        raise ConfigError(
            f"texts is a path; give a list of documents, for example [path.read_text()] ('{texts}')"
        )
    if isinstance(texts, Tensor | Mapping):
        raise ConfigError(f"texts is one {type(texts).__name__}; give a list of batches, for example [batch]")
    if not isinstance(texts, Iterable) or isinstance(texts, PreTrainedTokenizerBase):
        raise ConfigError(
            f"texts is a {type(texts).__name__}; give a list of strings, or a loader's batches; {ORDER}"
        )
    items = iter(texts)
    first = next(items, None)
    if first is None:
        raise ConfigError("texts are empty; give a list of documents, each a string, or batches")
    rest = chain([first], items)
    if isinstance(first, str):
        return False, Texts(rest)
    if isinstance(first, Mapping) and "text" in first and "input_ids" not in first:
        raise ConfigError("texts are rows with a field 'text'; give its column, for example dataset['text']")
    return True, rest


def _tokenizer(tokenizer: Any) -> PreTrainedTokenizerBase:
    if isinstance(tokenizer, PreTrainedTokenizerBase):
        return tokenizer
    inner = getattr(tokenizer, "tokenizer", None)
    hint = "give its .tokenizer" if isinstance(inner, PreTrainedTokenizerBase) else ORDER
    raise ConfigError(f"tokenizer is a {type(tokenizer).__name__}, not a tokenizer of transformers; {hint}")


def _num_embeddings(view: MoEModel) -> int:
    return int(view.model.get_input_embeddings().weight.shape[0])


def _check_length(view: MoEModel, length: int, what: str) -> None:
    limit = getattr(view.model.config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and length > limit:
        raise ConfigError(f"{what} {length} is above the model's {limit} tokens; give at most {limit}")
