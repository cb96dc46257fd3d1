"""The paper's measurements in the paper's own form, on a run: what stands beside the published numbers.

The notebooks measure with controls and in units of their own. Here E4 to E7 are done as the published code
does them, with each crosscoder of the run: E4 in a reconstruction (``ablation.own_effects``), E5 by adding
one decoder row as it is, at every position; E6 as the mean NRN of all features, dead ones too; E7 as the
relative distance of two offsets (``offset_losses``). One thing is not copied: words are read in context, not
at position 0, where the attention sink stands for every word."""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import plotly.express as px
import plotly.graph_objects as go

from ..figures import COLOURS, plain_titles
from ..geometry.parallelograms import pca
from ..geometry.words import read_relations
from ..results import Part, interval_text, pooled_metric, read_part, read_results
from ..runs import Run
from ..steering import outcomes
from ..steering.ablation import own_effects, sample_targets
from ..steering.artefacts import open_run
from ..steering.steer import Direction
from .loop import summary
from .published import SIZES, ablation, differences, numbers, over_words, read
from .variants import Variant, metric, part_of_study

E4_K, E7_DIMS = 20.0, 20  # of the numbers that are put side by side
STEERED = {"reflection": 4975, "deduction": 23569}  # E5: category, the published feature


def offset_losses(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """||in_i - out_i - in_j + out_j|| over the root of the sum of the four squared norms, for all pairs of
    words of a relation: the mean over the partners j of each word i, [n]. ``a``, ``b`` [n, d]: inputs and
    outputs."""
    offset, squares = a - b, (a**2).sum(1) + (b**2).sum(1)
    distance = np.linalg.norm(offset[:, None] - offset[None], axis=-1)
    loss = distance / np.sqrt(squares[:, None] + squares[None])
    return (loss.sum(1) - loss.diagonal()) / (len(a) - 1)


def relations(run: Run, layer: int | None, dims: Sequence[int]) -> pd.DataFrame:
    """E7: relation, dims (0: no PCA), words, base, distilled, difference, low, high. PCA of each relation's
    own words in each model; dimensions for which a relation has too few words are left out."""
    found, rows = read_relations(run, layer=layer), []
    vectors, index = found.vectors, {word: i for i, word in enumerate(found.words)}
    for relation, k in ((r, k) for r in found.relations for k in dims):
        own = np.array([index[word] for word in relation.words])
        if k and len(own) <= k:
            continue
        places = [[relation.words.index(pair[side]) for pair in relation.pairs] for side in (0, 1)]
        losses = {}
        for model in ("base", "distilled"):
            x = vectors[model][own].astype(np.float64)
            points = pca(x, k)[0] if k else x
            losses[model] = offset_losses(*(points[side] for side in places))
        means = {model: values.mean() for model, values in losses.items()}
        ends = zip(("difference", "low", "high"), over_words(losses["distilled"] - losses["base"]))
        head = {"relation": relation.name, "dims": k, "words": len(relation.pairs)}
        rows.append(head | means | dict(ends))
    return pd.DataFrame(rows)


@part_of_study("paper", 1)
def compute_paper(
    variant: Variant, targets: int = 100, shares: tuple = (0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0),
    puzzles: int = 40, max_new_tokens: int = 400, dims: tuple = (2, 5, 10, 20, 0), crosscoders: int = 0,
) -> tuple[dict, dict]:  # fmt: skip
    """The part "paper": E4 to E7 in the paper's own form, with the first ``crosscoders`` of the run (0: all).

    ``targets``: positions per category; ``shares``: k, percent of the dictionary; ``puzzles``: on which a row
    is added; ``dims``: of the PCA, 0 for none. Metrics, pooled over crosscoders: here_nrn_mean, here_nrn_sd;
    here_own_<category>_<model> (k 20%); here_added_norm_<category> (of the row, over the mean residual norm);
    here_words_<category> (ratio of lengths); here_loss_change, mean over relations with 20 components.
    Tables: "own", "added", "relations"."""
    opened = open_run(variant.run)
    store, tasks = opened.store, opened.medium.tasks("report", puzzles, variant.seed)
    sites = sample_targets(store, targets, "report", seed=variant.seed)
    steering = opened.steering(max_new_tokens, 1.0, variant.seed, "all")
    used, each, own, added = opened.each[: crosscoders or None], [], [], []
    for one in used:
        nrn = one.crosscoder.nrn(1, *one.crosscoder.names[::-1]).double().numpy()
        values = {
            "here_nrn_mean": metric(nrn.mean(), n=len(nrn)),
            "here_nrn_sd": metric(nrn.std(), n=len(nrn)),
        }
        models = {name: opened.models[name] for name in one.crosscoder.names}
        effects = own_effects(store, one.crosscoder, models, sites, shares, variant.seed)
        rows = summary(effects, seed=variant.seed)
        own.append(rows.assign(crosscoder=one.number))
        for row in rows[rows["k"] == E4_K].itertuples():
            values[f"here_own_{row.category}_{row.model}"] = metric(row.own, (row.low, row.high), row.n)
        decoder = one.crosscoder.rows("distilled")  # as it is: the scale is not undone
        chosen = {c: one.chosen[c] for c in STEERED if c in one.chosen}
        directions: dict[int, Direction] = {}  # one feature may stand for both categories
        for c, f in chosen.items():
            directions.setdefault(f, Direction(f"row {f} of {one.number}", c, decoder[f]))
        if directions:
            thoughts = steering.run("paper/all/report", tasks, [(d, 1.0) for d in directions.values()])
            compared = outcomes.compare(thoughts, seed=variant.seed).set_index("direction")
            added.append(compared.loc[[d.name for d in directions.values()]].assign(crosscoder=one.number))
        for c, f in chosen.items():
            direction = directions[f]
            ratio = outcomes.estimate(compared.loc[direction.name], "length_ratio")
            values[f"here_words_{c}"] = metric(*ratio, len(tasks))
            share = float(direction.vector.norm()) / store.mean_norms["distilled"]
            values[f"here_added_norm_{c}"] = metric(share)
        each.append(values)
    names = [name for name in each[0] if all(name in values for values in each)]
    metrics = {name: pooled_metric([values[name] for values in each]) for name in names}
    geometry = relations(variant.run, variant.layer, dims)
    with_pca = geometry[geometry["dims"] == E7_DIMS]
    if len(with_pca):
        metrics["here_loss_change"] = metric(with_pca["difference"].mean(), n=len(with_pca))
    tables = {"own": pd.concat(own), "relations": geometry}
    return metrics, tables | ({"added": pd.concat(added)} if added else {})


# --- side by side -------------------------------------------------------------------------------------------


def paper_rows() -> list[tuple[str, str, str, float, str, str]]:
    """(experiment, quantity, size, the paper's value, notebook or part of ours, metric of ours)."""
    last = read("training_log").groupby("size", sort=False).last()
    rows = []
    for size in SIZES:
        rows.append(("E1", "features per token", size, last.l0[size], "02", "l0"))
        explained = last.explained_variance[size]
        rows.append(("E1", "explained variance", size, explained, "02", "fve_distilled"))
        mean = numbers("E6", size)["nrn_mean"]
        rows.append(("E6", "mean NRN of all features", size, mean, "paper", "here_nrn_mean"))
    rows.append(("E6", "spread of NRN", "14B", numbers("E6", "14B")["nrn_sd"], "paper", "here_nrn_sd"))
    labels = numbers("E2", "1.5B")
    for side in ("highest", "lowest"):
        named = sum(labels[f"{side}_{kind}"] for kind in ("self_correction", "deduction", "alternative"))
        what = f"reasoning labels among the {side} NRN"
        rows.append(("E2", what, "1.5B", named / labels[f"{side}_labelled"], "03", f"reasoning_{side}"))
    own = ablation()
    for row in own[own["top_share"] == E4_K / 100].itertuples():
        what = f"own effect, k 20%, {row.category}, {row.model}"
        rows.append(("E4", what, "7B", row.own, "paper", f"here_own_{row.category}_{row.model}"))
    said = numbers("E5", "1.5B")
    for category, feature in STEERED.items():
        ratio = said[f"words_after_feature_{feature}"] / said[f"words_before_feature_{feature}"]
        what = f"words with a row of {category} added"
        rows.append(("E5", what, "1.5B", ratio, "paper", f"here_words_{category}"))
    share = said["norm_of_the_added_row"] / said["norm_of_a_scaled_residual"]
    rows.append(("E5", "norm of the added row, share", "1.5B", share, "paper", "here_added_norm_reflection"))
    geometry = differences()
    for size, group in geometry.groupby("size", sort=False):
        mean = group["difference"].mean()
        rows.append(("E7", "loss, distilled minus base, mean", size, mean, "paper", "here_loss_change"))
    return rows


def beside(pairs: Sequence[str] = ("tiny", "smol"), run: str = "default") -> pd.DataFrame:
    """The paper's numbers beside those of some pairs in the same form: experiment, quantity, size, paper, and
    for each pair value with its interval as text ("": not measured)."""
    rows = sorted(paper_rows(), key=lambda row: row[0])
    table = pd.DataFrame([row[:4] for row in rows], columns=["experiment", "quantity", "size", "paper"])
    for name in pairs:
        known = {place: _metrics(Run(name, run), place) for place in ("02", "03", "paper")}
        table[name] = [_text(known[place].get(quantity)) for *_, place, quantity in rows]
    return table


def _metrics(run: Run, place: str) -> Mapping[str, Mapping]:
    if place == "paper":
        return read_part(run, place).metrics
    made = (run.figures / "results" / f"{place}.json").is_file()
    return read_results(run, place)["metrics"] if made else {}


def _text(found: Mapping | None) -> str:
    return interval_text(found, 3) if found and found["value"] is not None else ""


def shows(part: Part, table: pd.DataFrame, pair: str) -> str:
    """What stands beside the paper's numbers, in words."""
    say = lambda name, digits=2: (
        interval_text(part.metrics[name], digits) if name in part.metrics else "not measured"
    )
    own = [n for n in part.metrics if n.startswith("here_own_")]
    below = [n for n in own if part.metrics[n]["ci"] and part.metrics[n]["ci"][1] < 0]
    counts = {m: sum(n.endswith(m) for n in below) for m in ("distilled", "base")}
    both = (table[pair] != "").sum()
    return (
        f"{both} of {len(table)} numbers stand beside `{pair}`'s. In the paper's form of E4 its own effect (k"
        f" 20%) is below 0 in {counts['distilled']} of 4 categories in the distilled model, and in"
        f" {counts['base']} in the base; a row as it is has {say('here_added_norm_reflection', 3)} of the"
        f" residual norm, and makes thoughts {say('here_words_reflection')} (reflection) and"
        f" {say('here_words_deduction')} (deduction) times as long; mean NRN of all features"
        f" {say('here_nrn_mean', 3)}."
    )


def plot(own: pd.DataFrame) -> go.Figure:
    """E4 in the paper's form: own effect by k, category and model; thin lines are crosscoders."""
    look = dict(x="k", y="own", color="model", facet_col="category", log_x=True)
    look["color_discrete_map"] = {name: COLOURS[name] for name in own["model"].unique()}
    keys = ["category", "model", "k"]
    fig = px.line(
        own.groupby(keys, sort=False, as_index=False)["own"].mean(), **look, width=1100, markers=True,
        title="Own effect here: the set minus its random set, in a reconstruction",
        labels={"k": "most frequent k, percent", "own": "change of the logit"},
    )  # fmt: skip
    thin = px.line(own, **look, line_group="crosscoder")
    fig.add_traces(thin.update_traces(line_width=0.7, opacity=0.4, showlegend=False).data)
    return plain_titles(fig.update_xaxes(tickvals=[0.5, 2, 10, 50]))
