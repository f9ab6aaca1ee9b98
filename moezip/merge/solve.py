"""The stages that all merging methods share: align, combine, router, price."""

from __future__ import annotations

from typing import Any

from moezip.merge.align import orders
from moezip.merge.combine import combined
from moezip.merge.layer import Merge, MergeLayer, averages
from moezip.merge.price import priced
from moezip.merge.router import fitted
from moezip.plan.plan import RouterForm

FORMS: dict[str, RouterForm] = {"dominant": "kept", "sum": "fitted", "remap": "remap"}


def merge(layer: MergeLayer, params: Any) -> Merge:
    """One layer's output experts and router, with the settings of ``moezip.merge.params.MergeParams``, and what they
    cost."""
    found = merged(layer, params)
    priced(layer, found)
    return found


def merged(layer: MergeLayer, params: Any) -> Merge:
    """The same without the price, for methods that go on from there."""
    found = Merge(averages(layer.groups, layer.usage(params.combine), orders(layer, params)), FORMS[params.router])
    found.notes += combined(layer, params, found)
    if params.router == "sum":
        fitted(layer, params, found)
    return found
