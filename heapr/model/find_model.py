"""Finds a model, checks it, and says what identifies it.

In: a built-in name, a local folder or a hub id. Out: a `ModelSource`, which is cheap: no weights are loaded
or downloaded. Every mistake that can be seen in the configuration is refused here.
"""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import PretrainedConfig

from heapr.errors import ConfigError
from heapr.inputs import CONFIG_FILE, is_on_hub
from heapr.model.auto_class import WRAPPER, auto_class_name
from heapr.model.description import read_config
from heapr.model.find_folder import find_folder
from heapr.model.load import ModelSource, on_meta
from heapr.model.model_files import DESCRIPTION_FILES, check_weight_files, hash_folder, weight_files
from heapr.model.model_shape import check_sizes, shape_of
from heapr.model.quantised import read_quantization

DTYPES = ("float32", "bfloat16", "float16", "float64")  # that weights may have


def find_model(
    path: str,
    *,
    dtype: str | None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    digests: Path | None = None,
    config_only: bool = False,
) -> ModelSource:
    """Find a model and check everything that can be checked without its weights.

    Args:
        path: "builtin:<name>", a local folder, or a hub id.
        dtype: name of a torch dtype; None takes the dtype that config.json gives for the weights.
        revision: branch, tag or commit of a hub id; its commit enters the identity.
        trust_remote_code: whether Python files in the folder may run.
        digests: folder that caches the hashes of large local weights.
        config_only: do not require weights, and download nothing but config.json of a hub model.

    Raises:
        ConfigError: there is no such model, it is not a Mixture-of-Experts model, it needs a missing
            capability, or its weights are damaged.
    """
    description = [CONFIG_FILE] if config_only else DESCRIPTION_FILES
    folder = find_folder(path, revision, description, has_code=trust_remote_code)
    config = read_config(folder, trust_remote_code)
    # Before a model is built, which sets the configuration's dtype.
    stored_dtype: torch.dtype | None = config.get_text_config().dtype
    quantization = read_quantization(folder)
    default = torch.float32 if quantization is None else torch.bfloat16
    dtype = dtype or _dtype_of(config, folder, default=default)
    if dtype not in DTYPES:
        raise ConfigError(f"dtype='{dtype}' is unknown; choose one of {', '.join(DTYPES)}")
    model = on_meta(config, path, trust_remote_code)
    shape = shape_of(model)
    if not is_on_hub(path) and (weight_files(folder) or not config_only):
        check_weight_files(folder)
    check_sizes(config, shape["widths"].values(), shape["experts_per_token"], folder)
    identity = {**_identity_of(path, folder, digests, has_code=trust_remote_code), "dtype": dtype}
    if trust_remote_code:
        identity["remote_code"] = "trusted"
    if auto_class_name(config) == WRAPPER:
        identity["loaded_as"] = type(model).__name__
    return ModelSource(
        folder=folder,
        identity=identity,
        dtype=getattr(torch, dtype),
        stored_dtype=stored_dtype,
        config=config,
        architecture=type(model).__name__,
        trust_remote_code=trust_remote_code,
        quantization=quantization,
        **shape,
    )


def _identity_of(path: str, folder: Path, digests: Path | None, *, has_code: bool) -> dict[str, str]:
    """What identifies a model's files."""
    if is_on_hub(path):
        return {"hub": path, "commit": folder.name}
    return {"sha256": hash_folder(folder, digests, has_code=has_code)}


def _dtype_of(config: PretrainedConfig, folder: Path, *, default: torch.dtype) -> str:
    """Name of the weights' dtype as the configuration gives it.

    Raises:
        ConfigError: gradients cannot be computed in this dtype.
    """
    declared = config.dtype or config.get_text_config().dtype or default
    dtype = str(declared).removeprefix("torch.")
    if dtype not in DTYPES:
        raise ConfigError(
            f"config.json in '{folder}' says dtype {dtype}; give model.dtype as one of {', '.join(DTYPES)}"
        )
    return dtype
