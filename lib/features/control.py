"""The positive control: does the method find what was planted?

For pairs whose registry entry has ``planted``, the number of dimensions of the residual stream, the last
ones, that the distilled model alone writes (``lib.distil.control``). At half depth the models differ there
and nowhere else."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from ..results import Results
from ..stats import bootstrap, wilson
from .table import Inspection, over_crosscoders

MOSTLY = 0.5  # of a row's squared norm in the planted dimensions: so much makes a feature a planted one


def planted_share(rows: Tensor, width: int) -> np.ndarray:
    """The share of each row's squared norm that lies in the last ``width`` dimensions: [F], of [F, d]."""
    squares = rows.double().square()
    return (squares[:, -width:].sum(1) / squares.sum(1).clamp(min=1e-12)).numpy()


def explained(sums: np.ndarray) -> float:
    """Explained variance, from squared errors and squared deviations [documents, 2]."""
    return float(1 - sums[:, 0].sum() / sums[:, 1].sum())


def record(results: Results, inspection: Inspection, found: np.ndarray) -> pd.DataFrame:
    """What the features that were ``found`` (bool [F]) have to do with what was planted.

    Put into ``results``: control_found, their number; control_subspace_precision, the share of them that are
    planted features; control_subspace_recall, the share of the variance of the planted dimensions, on the
    split "report", that they reconstruct (about 0 if there are none); control_planted, the number of planted
    features, found or not; table control, a row per planted or found feature."""
    width, store, crosscoder = inspection.pair.planted, inspection.store, inspection.crosscoder
    rows = crosscoder.rows("distilled", raw=True)
    share = planted_share(rows, width)
    planted = (share > MOSTLY) & inspection.table["alive"].to_numpy(bool)
    hits, n = int((found & planted).sum()), int(found.sum())
    results.add("control_found", n)
    results.add("control_planted", planted.sum())
    results.add("control_subspace_precision", hits / n if n else np.nan, wilson(hits, n) if n else None, n)
    report = inspection.report
    x = store.activations(report.rows)[store.models.index("distilled")].double().numpy()
    x_hat = report.codes[:, found] @ rows[torch.from_numpy(found)].double().numpy()
    x_hat += crosscoder.bias("distilled", raw=True).double().numpy()
    errors, variance = (np.square((x - y)[:, -width:]).sum(1) for y in (x_hat, x.mean(0)))
    documents = pd.DataFrame({"error": errors, "variance": variance}).groupby(store.documents[report.rows])
    sums = documents.sum().to_numpy()
    recall, ci = explained(sums), bootstrap(sums, explained)
    results.add("control_subspace_recall", recall, ci, len(sums))
    table = inspection.table.assign(planted_share=share, found=found)[planted | found]
    columns = ["feature", "planted_share", "found", "nu_eps", "nrn", "frequency", "label"]
    return results.table("control", table[[c for c in columns if c in table]])


def record_all(results: Results, inspections: Sequence[Inspection], found: Sequence[np.ndarray]) -> None:
    """``record`` of each crosscoder; control_<...>_worst: the smallest; table control."""
    over_crosscoders(results, record, zip(inspections, found, strict=True))
    for name in ("control_subspace_recall", "control_subspace_precision"):
        results.worst(name)


def shows(results: Results) -> str:
    """In words; nothing for a pair without something planted."""
    if "control_found" not in results.metrics:
        return ""
    return (
        f"**The positive control**: {results.text('control_found', 1)} recurrent features lie beyond the"
        f" null; {results.text('control_subspace_precision')} of them write what was planted, and they"
        f" reconstruct {results.text('control_subspace_recall')} of its variance (least"
        f" {results.values['control_subspace_precision_worst']:.2f} and"
        f" {results.values['control_subspace_recall_worst']:.2f}). Where nothing was planted"
        f" {results.text('control_null_found', 1)} such features are found."
    )
