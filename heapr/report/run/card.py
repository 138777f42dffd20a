"""The card of a pruned checkpoint, its README.md.

In: what was done, and metrics as in summary.json (none before they are measured). Out: Markdown.
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
UNITS = {"atomic_experts": "atomic experts", "flops": "experts' FLOPs"}  # what the ratio is a share of
LOADING = {
    "ragged": (
        """Every expert has a width of its own, so the model needs the modelling file beside the weights,
which imports torch and transformers alone:

    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)

With heapr installed no code of this folder runs: `model = heapr.load_pruned(folder)`.
"""
    ),
    "uniform": "All experts have one width: it loads $how, without further code.\n",
    "masked": (
        "Removed atomic experts are zeros in the original shapes (`parameters_zero`): it loads $how and is no"
        " smaller.\n"
    ),
}


def model_card(
    about: Mapping[str, Any], metrics: Mapping[str, Mapping[str, float]], previous: str = ""
) -> str:
    """The card; figures of a previous one that are not measured now are kept.

    Args:
        about: what was done.
        metrics: dense and pruned.
        previous: the card as it is.
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
        widths=(
            f"one width of {about['width']}"
            if "width" in about
            else f"widths rounded to multiples of {about['width_multiple']}"
        ),
        num_samples=calibration["num_samples"],
        sequence_length=calibration["sequence_length"],
        seed=calibration["seed"],
        text=_text(calibration["corpus"]),
        beyond=_beyond(about),
        metrics=_table(metrics, previous),
        loading=_loading(about),
    )


def _loading(about: Mapping[str, Any]) -> str:
    """How it loads, and what of the original is not in it."""
    wrapper = about.get("language_model_of")
    text = Template(LOADING[about["form"]]).substitute(
        how="as a language model" if wrapper else "as the original model does"
    )
    missing = [f"of the original `{wrapper}` only the language model is in it"] if wrapper else []
    missing += (
        ["heads that predict further tokens are not in it"] if about.get("prediction_heads_left_out") else []
    )
    sentence = "; ".join(missing)
    return f"{text}{sentence[:1].upper()}{sentence[1:]}.\n" if missing else text


def _text(corpus: Mapping[str, Any]) -> str:
    """What was calibrated on: a corpus and its split, or the parts of a mixture with their shares."""
    if "parts" not in corpus:
        return f"`{corpus['corpus']}` ({corpus['split']})"
    return ", ".join(f"{part['share']:.3g} x {_text(part['corpus'])}" for part in corpus["parts"])


def _beyond(about: Mapping[str, Any]) -> str:
    """Rounds and repair, in words."""
    sentences = []
    if about.get("rounds", 1) > 1:
        sentences.append(f" In {about['rounds']} rounds, each measured anew.")
    if about.get("repair"):
        sentences.append(
            f" What is left was repaired on the same tokens (`{class_name(about['repair']['_target_'])}`)."
        )
    return "".join(sentences)


def _table(metrics: Mapping[str, Mapping[str, float]], previous: str) -> str:
    """Dense beside pruned, of whatever was measured on both."""
    dense, pruned = metrics.get("dense", {}), metrics.get("pruned", {})
    rows = dict(ROW.findall(previous))
    # A row of two zeros says nothing.
    measured = [name for name in dense if name in pruned and (dense[name] or pruned[name])]
    rows |= {name: f"{_number(dense[name])} | {_number(pruned[name])}" for name in measured}
    lines = [f"| {name} | {numbers} |\n" for name, numbers in rows.items()]
    return "| | dense | pruned |\n|---|---|---|\n" + "".join(lines) if lines else ""


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.6g}"
