"""Whether results may share a table: the protocols by which they were measured, and how those differ.

In: protocols, or summaries as in summary.json. Out: differences in words.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

TOKENIZER_FIELDS = frozenset({"num_tokens", "num_predicted_tokens", "tokens_sha256", "special_tokens"})

Record = Mapping[str, Any]  # how a corpus or task was measured, by field
Protocol = Mapping[str, Record]  # by corpus or task, or by the result that holds it
Summaries = Mapping[str, Mapping[str, Any]]  # as in summary.json, by the name of a run


def protocol_differences(protocols: Mapping[str, Protocol]) -> list[str]:
    """Return how results differ in the way they were measured; an empty list if they agree.

    Tokenizers cut a text into different tokens: between models of different families the numbers of tokens
    and their fingerprints differ, and their perplexities cannot be compared.

    Args:
        protocols: by the name of a result. What only one result measured is no difference.

    Returns:
        One line for every corpus or task and field that differs.
    """
    lines = []
    all_measured = dict.fromkeys(name for protocol in protocols.values() for name in protocol)
    for measured in all_measured:
        records = {}
        for label, protocol in protocols.items():
            if measured in protocol:
                records[label] = _flat(protocol[measured])
        fields = dict.fromkeys(field for record in records.values() for field in record)
        for field in fields:
            labels_by_value = _labels_by_value(records, field)
            if len(labels_by_value) > 1:
                values = [f"{value} ({_few(labels)})" for value, labels in labels_by_value.items()]
                lines.append(f"{measured} was measured with different {field}: {', '.join(values)}")
    return lines


def _labels_by_value(records: Protocol, field: str) -> dict[str, list[str]]:
    """Return which results have each value of a field, by the value as JSON; a missing field is null."""
    labels_by_value: dict[str, list[str]] = {}
    for label, record in records.items():
        value = json.dumps(record.get(field))
        labels_by_value.setdefault(value, []).append(label)
    return labels_by_value


def compare_summaries(summaries: Summaries) -> list[str]:
    """Return how runs differ in the way they were measured, as `protocol_differences` does.

    Args:
        summaries: of runs, by name, as in summary.json.
    """
    return protocol_differences(_protocols(summaries))


def compare_models(summaries: Summaries) -> list[str]:
    """Return how runs of different models differ, apart from what their tokenizers decide.

    Args:
        summaries: of runs, by name, as in summary.json.
    """
    without_tokens = {}
    protocols = _protocols(summaries)
    for name, protocol in protocols.items():
        without_tokens[name] = {measured: _without_tokens(record) for measured, record in protocol.items()}
    return protocol_differences(without_tokens)


def _protocols(summaries: Summaries) -> dict[str, Protocol]:
    """Return the protocols of the dense and the pruned model of every run, by run and model."""
    protocols = {}
    for name, summary in summaries.items():
        for variant, protocol in summary["protocols"].items():
            protocols[f"{name} {variant}"] = protocol
    return protocols


def _without_tokens(record: Record) -> Record:
    return {field: value for field, value in record.items() if field not in TOKENIZER_FIELDS}


def _flat(record: Record, prefix: str = "") -> dict[str, Any]:
    """Return nested fields under dotted names."""
    flat: dict[str, Any] = {}
    for name, value in record.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat


def _few(labels: list[str]) -> str:
    first, *others = labels
    return f"{first} and {len(others)} more" if others else first
