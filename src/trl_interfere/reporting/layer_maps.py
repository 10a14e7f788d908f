"""Measures by layer and module: names of modules, and values of shape `(layers, modules)`."""

import re
from typing import Any

import numpy as np

from ..analysis.report import InterferenceReport


PARTS = ("attention", "mlp", "norm")
KINDS = {"mlp": "MLP channels", "query": "query heads", "key_value": "key/value heads"}
Maps = dict[str, tuple[list[str], np.ndarray]]  # by title


def cosine_map(report: InterferenceReport) -> np.ndarray:
    """Gradient cosines of the layers, of shape `(num_layers, 3)`, in the order of `PARTS`."""
    found = {}
    for name, value in report.cosines["modules"].items():
        match = re.fullmatch(rf"layers\.(\d{{1,4}})\.({'|'.join(PARTS)})", name)
        if match and value is not None:
            found[int(match[1]), PARTS.index(match[2])] = value
    table = np.full((1 + max((layer for layer, _ in found), default=0), len(PARTS)), np.nan)
    for place, value in found.items():
        table[place] = value
    return table


def damage_map(report: InterferenceReport) -> tuple[list[str], np.ndarray]:
    """Kinds of routes, and the damage of each in each layer, in nats per token."""
    sums = {KINDS.get(kind, kind): values for kind, values in report.by_layer("damage").items() if values.size}
    return list(sums), np.array(list(sums.values())).T


def repair_maps(record: dict[str, Any]) -> Maps:
    """
    What a repair changed. A subspace rollback: of each layer the part of its output, and the effective dimension of
    the change, beside that of a random change through the same moments; experts of a layer are averaged. A rollback of
    routes: how many of each kind it moves.
    """
    maps: Maps = {}
    if "routes" in record:
        kinds = list(record["routes"])
        table = np.zeros((1 + max(int(layer) for found in record["routes"].values() for layer in found), len(kinds)))
        for column, kind in enumerate(kinds):
            for layer, places in record["routes"][kind].items():
                table[int(layer), column] = len(places)
        maps["routes that are rolled back (number)"] = [KINDS.get(kind, kind) for kind in kinds], table
    elif layers := record.get("layers"):
        parts = list(dict.fromkeys(row["name"].rsplit(".", 1)[-1] for row in layers))
        for field, factor, title in (
            ("output_change", 100, "output that the correction changes (%)"),
            ("effective_dimension", 1, "effective dimension of the correction (directions)"),
            ("effective_dimension_random", 1, "the same of a random change (directions)"),
        ):
            table = np.full((1 + max(row["block"] for row in layers), len(parts)), np.nan)
            for block, column in np.ndindex(table.shape):
                rows = [row for row in layers if row["block"] == block and row["name"].endswith(f".{parts[column]}")]
                if found := [row[field] for row in rows if row.get(field) is not None]:
                    table[block, column] = factor * np.mean(found)
            maps[title] = [part.removesuffix("_proj") for part in parts], table
    return maps
