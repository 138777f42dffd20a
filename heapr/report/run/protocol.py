"""Whether results may stand in one table: the protocols they were measured by, and how they differ.

In: protocols, or summaries as in summary.json. Out: differences in words.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

TOKENIZER_FIELDS = frozenset({"num_tokens", "num_predicted_tokens", "tokens_sha256", "special_tokens"})


def protocol_differences(protocols: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> list[str]:
    """How results differ in the way they were measured: one line for every corpus or task and field, none if
    they agree.

    Tokenizers cut a text into different tokens: between models of different families the numbers of tokens
    and their fingerprints differ, and their perplexities cannot be compared.

    Args:
        protocols: by the name of a result, then by corpus or task. What only one result measured is no
            difference.
    """
    lines = []
    for measured in dict.fromkeys(name for records in protocols.values() for name in records):
        records = {label: _flat(found[measured]) for label, found in protocols.items() if measured in found}
        for field in dict.fromkeys(field for record in records.values() for field in record):
            labels_by_value: dict[str, list[str]] = {}
            for label, record in records.items():
                labels_by_value.setdefault(json.dumps(record.get(field)), []).append(label)
            if len(labels_by_value) > 1:
                values = ", ".join(f"{value} ({_few(labels)})" for value, labels in labels_by_value.items())
                lines.append(f"{measured} was measured with different {field}: {values}")
    return lines


def compare_summaries(summaries: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """As `protocol_differences`, between runs.

    Args:
        summaries: of runs, by name, as in summary.json.
    """
    return protocol_differences(
        {
            f"{name} {variant}": records
            for name, summary in summaries.items()
            for variant, records in summary["protocols"].items()
        }
    )


def compare_models(summaries: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """As `compare_summaries`, between runs of different models: what their tokenizers decide does not count.

    Args:
        summaries: of runs, by name, as in summary.json.
    """

    def without_tokens(records: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
        return {
            measured: {field: value for field, value in record.items() if field not in TOKENIZER_FIELDS}
            for measured, record in records.items()
        }

    protocols = {name: summary["protocols"] for name, summary in summaries.items()}
    return protocol_differences(
        {
            f"{n} {variant}": without_tokens(r)
            for n, found in protocols.items()
            for variant, r in found.items()
        }
    )


def _flat(record: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested fields under dotted names."""
    flat: dict[str, Any] = {}
    for name, value in record.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value}
    return flat


def _few(labels: list[str]) -> str:
    return labels[0] if len(labels) == 1 else f"{labels[0]} and {len(labels) - 1} more"
