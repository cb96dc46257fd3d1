"""What the paper's authors published (data/published), read with the controls that are in the same files.

``loop`` is the arithmetic of the published training loop, beside what its logs count; ``differences`` gives
the parallelogram losses intervals over words; ``ablation`` puts each set of features beside its random set.
"""

from math import ceil

import numpy as np
import pandas as pd
import plotly.express as px
import plotly.graph_objects as go
from scipy import stats

from ..figures import COLOURS, express_bars, plain_titles
from ..runs import read_table
from ..settings import ROOT
from ..stats import t_interval

FOLDER = ROOT / "data" / "published"
SIZES = ("1.5B", "7B", "14B")
SETS = ("features with NRN over 0.5", "random features")


def read(name: str) -> pd.DataFrame:
    """A table of data/published."""
    return read_table(FOLDER / f"{name}.csv")


def numbers(experiment: str, size: str = "all") -> dict[str, float]:
    """{quantity: value} of one experiment and size, from numbers.csv."""
    rows = read("numbers").query("experiment == @experiment and size == @size")
    return dict(zip(rows["quantity"], rows["value"]))


def loop() -> pd.DataFrame:
    """A row per quantity: what the code gives with sequences as configured, what it would give with those of
    the text's length, and what the logs show of each size.

    The first fill reads as many sequences as go into the buffer; text that is shorter than configured leaves
    the rest at zero. Every later refill asks for the sequences from the first fill's last one on, up to a
    smaller number: it gets none. Batches are taken until half of the buffer has been passed. An untrained
    crosscoder, whose encoder is its decoder, fires half of its features on a row and none on a row of zeros.
    """
    s = numbers("setting")
    columns = {}
    for name, length in (
        ("code, as configured", s["sequence_length_configured"]),
        ("code, at the text's length", s["sequence_length_of_the_text"]),
    ):
        sequences = int(s["batch_size"] * s["buffer_batches"] // (length - 1))
        rows = sequences * (length - 1)
        filled = sequences * (s["sequence_length_of_the_text"] - 1)
        columns[name] = {
            "rows of the buffer": rows,
            "rows that hold a token": filled,
            "share of rows that hold a token": filled / rows,
            "distinct tokens in all": filled,
            "passes of a model per refill": ceil(sequences // 2 / s["sequences_per_pass"]),
            "steps per refill": (rows // 2 - s["batch_size"]) // s["batch_size"] + 1,
            "times that each row is shown": numbers("log", "14B")["steps"] * s["batch_size"] / rows,
        }
    log = read("training_log").query("row == 0").set_index("size")["l0"]
    for size in SIZES:
        counted = numbers("log", size)
        columns[f"log, {size}"] = {
            "share of rows that hold a token": 2 * log[size] / s["features"],
            "passes of a model per refill": counted["passes_per_refill"],
            "steps per refill": counted["steps"] / counted["refills"],
        }
    return pd.DataFrame(columns)


def ablation() -> pd.DataFrame:
    """E4 of the 7B pair: a row per category, share k and model: change with the set removed, with the random
    set, their ratio, and the own effect (set minus random) with its 95% interval over positions."""
    sets, own, parts = read("e4_ablation_7b"), read("e4_own_effect_7b"), []
    keys = ["category", "top_share"]
    for model in ("base", "distilled"):
        names = {f"{model}_own": "own", f"{model}_own_se": "se"} | dict(zip(SETS, ("set", "random")))
        changes = sets.pivot(index=keys, columns="removed_set", values=f"{model}_change")
        part = own.set_index(keys).join(changes).rename(columns=names)[["n_positions", *names.values()]]
        half = stats.t.ppf(0.975, part["n_positions"] - 1) * part["se"]
        low, high = part["own"] - half, part["own"] + half
        parts.append(part.assign(model=model, share=part["random"] / part["set"], low=low, high=high))
    return pd.concat(parts).reset_index()


def over_words(by_word: np.ndarray) -> tuple[float, float, float]:
    """(mean over pairs of words, low, high) of a quantity, given its mean over each word's partners [n].

    Pairs share words: the interval is the jackknife's, leaving out one word at a time (Arvesen 1969)."""
    n = len(by_word)
    left_out = (n * by_word.mean() - 2 * by_word) / (n - 2)
    pseudo_values = n * by_word.mean() - (n - 1) * left_out
    return float(by_word.mean()), *t_interval(pseudo_values)


def differences() -> pd.DataFrame:
    """E7 with 20 components: relation, size, words, base, distilled (means over pairs of words), difference,
    low, high (``over_words``)."""
    rows = []
    for relation, words in read("e7_by_word").groupby("relation", sort=False):
        n = len(words)
        for size in SIZES:
            base, distilled = (words[f"{model}_{size.lower()}"] for model in ("base", "distilled"))
            d = (distilled - base).to_numpy()  # of each word, over the n - 1 pairs that it is in
            rows.append((relation, size, n, base.mean(), distilled.mean(), *over_words(d)))
    columns = ["relation", "size", "words", "base", "distilled", "difference", "low", "high"]
    return pd.DataFrame(rows, columns=columns)


def apart(table: pd.DataFrame) -> pd.Series:
    """Whether an interval excludes 0."""
    return (table["low"] > 0) | (table["high"] < 0)


def plot_log(log: pd.DataFrame) -> go.Figure:
    """L0 and explained variance over the steps of the three trainings."""
    names = {"l0": "features per token", "explained_variance": "explained variance"}
    frame = log.assign(step=100 * log["row"] + 1).rename(columns=names)
    frame = frame.melt(["size", "step"], list(names.values()), "curve")
    look = dict(color="size", facet_col="curve", facet_col_spacing=0.1, log_x=True, markers=True)
    fig = px.line(frame, x="step", y="value", title="What the published logs say", **look)
    fig.update_yaxes(matches=None, showticklabels=True, title_text="").update_yaxes(range=[0, 1], col=2)
    return plain_titles(fig.update_yaxes(rangemode="tozero", col=1).update_traces(marker_size=5))


def plot_ablation(table: pd.DataFrame) -> go.Figure:
    """E4: change of the logit with the set and with its random set removed, by k."""
    frame = table.rename(columns=dict(zip(("set", "random"), SETS)))
    frame = frame.melt(["category", "top_share", "model"], list(SETS), "removed", "change")
    title = "What the set takes away, and what as many random features do"
    return _by_k(frame, y="change", line_dash="removed", title=title)


def plot_own(table: pd.DataFrame) -> go.Figure:
    """E4: the own effect, set minus random, by k."""
    bars = express_bars(table, "own", "low", "high")
    return _by_k(table, y="own", title="Own effect: the set minus its random set", **bars)


def _by_k(table: pd.DataFrame, **look) -> go.Figure:
    colours = {name: COLOURS[name] for name in ("base", "distilled")}
    look |= dict(color="model", color_discrete_map=colours, facet_col="category", log_x=True, markers=True)
    fig = px.line(table, x="top_share", width=1100, **look)
    ticks = dict(tickvals=[0.005, 0.02, 0.1, 0.5], ticktext=["0.5%", "2%", "10%", "50%"])
    fig.update_xaxes(title_text="most frequent k", **ticks)
    fig.update_yaxes(title_text="change of the logit", col=1)
    return plain_titles(fig.update_traces(marker_size=4))


def plot_differences(table: pd.DataFrame) -> go.Figure:
    """E7: parallelogram loss, distilled minus base."""
    bars = express_bars(table, "difference", "low", "high")
    look = dict(color="size", title="Parallelogram loss, distilled minus base", **bars)
    fig = px.scatter(table, x="relation", y="difference", **look)
    fig.update_layout(scattermode="group").update_traces(marker_size=8)
    return fig.add_hline(y=0, line_width=1, line_color="#444444").update_xaxes(title_text="")
