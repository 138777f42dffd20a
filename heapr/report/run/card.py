"""The card of a pruned checkpoint, its README.md.

In: what was done, and metrics as in summary.json (empty before they are measured). Out: Markdown.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from string import Template
from typing import Any

from heapr.words import class_name

CARD = Template("""---
library_name: transformers
tags: [heapr, mixture-of-experts, pruning]
---
# $model, $removed of its routed $unit removed
Pruned with heapr: criterion `$criterion`, ratio $ratio, scope `$scope`, form `$form`, $widths.
Calibrated on $num_samples sequences of $sequence_length tokens of $text, seed $seed.$beyond

$metrics
$loading
`heapr/plan.safetensors` holds which atomic experts were kept (bool, experts x atomic experts, by decoder
layer); `heapr` in `config.json` says what was done and to which weights.
""")
ROW = re.compile(r"^\| ([^|\s]+) \| ([^|]+ \| [^|]+) \|$", re.MULTILINE)
TABLE_HEAD = "| | dense | pruned |\n|---|---|---|\n"
UNITS = {"atomic_experts": "atomic experts", "flops": "experts' FLOPs"}  # what the ratio is a share of
WITH_MODELLING_FILE = """ has a width of its own, so the model needs the modelling file beside the weights,
which imports torch and transformers alone. It runs with transformers 5.16 and newer (tried: 5.16 to 5.23):

    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)

With heapr installed no code of this folder runs: `model = heapr.load_pruned(folder)`.
"""
LOADING = {
    "ragged": f"Every expert{WITH_MODELLING_FILE}",
    "per_layer": f"Every layer{WITH_MODELLING_FILE}",
    "fewer_experts": "Removed experts are gone from the router too: it loads $how, without further code.\n",
    "uniform": "All experts have one width: it loads $how, without further code.\n",
    "masked": (
        "Removed atomic experts are zeros in the original shapes (`parameters_zero`): it loads $how and is no"
        " smaller.\n"
    ),
}


def model_card(
    about: Mapping[str, Any], metrics: Mapping[str, Mapping[str, float]], previous: str = ""
) -> str:
    """Return the card; it keeps the numbers of the previous card that were not measured again.

    Args:
        about: what was done.
        metrics: of the dense and the pruned model.
        previous: the card that it replaces.
    """
    calibration = about["calibration"]
    return CARD.substitute(
        model=about["model"],
        removed=f"{about.get('ratio_reached', about['ratio']):.1%}",
        unit=UNITS[about.get("budget", "atomic_experts")],
        criterion=class_name(about["criterion"]["_target_"]),
        ratio=f"{about['ratio']:.6g}",
        scope=about["scope"],
        form=about["form"],
        widths=_widths(about),
        num_samples=calibration["num_samples"],
        sequence_length=calibration["sequence_length"],
        seed=calibration["seed"],
        text=_text(calibration["corpus"]),
        beyond=_beyond(about),
        metrics=_table(metrics, previous),
        loading=_loading(about),
    )


def _widths(about: Mapping[str, Any]) -> str:
    if "width" in about:
        return f"one width of {about['width']}"
    one = "one width per layer, a multiple" if about["form"] == "per_layer" else "widths rounded to multiples"
    return f"{one} of {about['width_multiple']}"


def _loading(about: Mapping[str, Any]) -> str:
    """Say how the checkpoint loads, and which parts of the original it lacks."""
    wrapper = about.get("language_model_of")
    how = "as a language model" if wrapper else "as the original model does"
    text = Template(LOADING[about["form"]]).substitute(how=how)
    if "dequantised_from" in about:
        text += (
            f"The original weights are quantised ({about['dequantised_from']}). They were dequantised before"
            f" pruning, and these are written as {about['pruned_from']['dtype']}.\n"
        )
    if "text_decoder_of" in about:
        text += (
            f"It is a `{about['text_decoder_of']}` as the original: `AutoModelForImageTextToText` loads it."
            " Its text decoder was pruned, everything else is unchanged.\n"
        )
    missing = []
    if wrapper:
        missing.append(f"of the original `{wrapper}` only the language model is in it")
    if about.get("prediction_heads_kept"):
        text += "Heads that predict further tokens are the original's, unchanged.\n"
    if about.get("prediction_heads_left_out"):
        missing.append("heads that predict further tokens are not in it")
    sentence = "; ".join(missing)
    return f"{text}{sentence[:1].upper()}{sentence[1:]}.\n" if missing else text


def _text(corpus: Mapping[str, Any]) -> str:
    """Name the calibration text: a corpus and its split, or the parts of a mixture with their shares."""
    if "parts" not in corpus:
        return f"`{corpus['corpus']}` ({corpus['split']})"
    parts = [f"{part['share']:.3g} x {_text(part['corpus'])}" for part in corpus["parts"]]
    return ", ".join(parts)


def _beyond(about: Mapping[str, Any]) -> str:
    """Describe rounds and repair."""
    text = ""
    if about.get("rounds", 1) > 1:
        text += f" In {about['rounds']} rounds, each measured anew."
    if about.get("repair"):
        repair = class_name(about["repair"]["_target_"])
        text += f" What is left was repaired on the same tokens (`{repair}`)."
    return text


def _table(metrics: Mapping[str, Mapping[str, float]], previous: str) -> str:
    """Return dense beside pruned, for every metric that was measured on both."""
    dense = metrics.get("dense", {})
    pruned = metrics.get("pruned", {})
    rows = dict(ROW.findall(previous))
    in_both = [name for name in dense if name in pruned]
    for name in in_both:
        before = dense[name]
        after = pruned[name]
        # A row of two zeros is left out.
        if before or after:
            rows[name] = f"{_number(before)} | {_number(after)}"
    if not rows:
        return ""
    lines = [f"| {name} | {numbers} |\n" for name, numbers in rows.items()]
    return TABLE_HEAD + "".join(lines)


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.6g}"
