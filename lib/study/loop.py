"""What the published training loop does to a crosscoder: as written, as run, and the steps between.

As the published code and its logs stand (``published.loop``), few tokens were shown many times, beside as
many rows of zeros, to weights in bfloat16 whose rows began independently in the two models. Here each of
these is put into an L1 crosscoder one after the other (ARMS), on three stores:

    pair      the run's base and distilled model
    null      the base and ``null_a``, between which nothing was distilled
    planted   activations with known features, none of which is unique (``planted``)

Kept as in the rest of this study: batch size, learning rate and its schedule, the mean from which training
begins. A small dictionary sees fewer tokens, so what is repeated keeps two proportions of the published run:
TOKENS_PER_FEATURE distinct tokens, each shown hundreds or thousands of times."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import pandas as pd
import plotly.express as px
import plotly.graph_objects as go
import torch

from ..activations.store import Store
from ..crosscoder.codes import codes, firing_frequency
from ..crosscoder.health import health_card
from ..crosscoder.model import CrossCoder
from ..crosscoder.recurrence import recurrent
from ..crosscoder.training import TrainConfig, Trainer, train
from ..features.table import describe
from ..figures import COLOURS, plain_titles
from ..labels import CATEGORIES
from ..models.reader import open_models
from ..results import Part, interval_text, pooled_metric, read_part
from ..runs import Run
from ..stats import bootstrap
from ..steering.ablation import own_effects, sample_targets
from .architectures import OVER, UNDER, match_l1
from .planted import Planted, PlantedStore, shuffled
from .variants import Variant, metric, part_of_study

TOKENS_PER_FEATURE = 2.0  # published: 65,504 for 32,768 features
ARMS = {  # arm: what is changed in the one before it
    "l1": {},
    "independent rows": {"independent": True},
    "as written": {"rounded": True},
    "tokens repeated": {"repeated": True},
    "as run": {"zeros": True},
}
STORES = ("pair", "null", "planted")
ENDS = 0.1  # share of the alive features that are the highest, and the lowest, by NRN
NAMES = {  # result of notebook 16: metric of this part
    "as_written_fve": "pair_as_written_fve_distilled",
    "as_run_fve": "pair_as_run_fve_distilled",
    "as_run_false_positives": "planted_as_run_one_sided",
    "as_run_e4_own": "null_as_run_own",
}
SHOWN = {  # quantity: what the figure says of it
    "fve_distilled": "FVE, distilled, held out",
    "nrn_sd": "spread of NRN",
    "one_sided": "NRN outside 0.3 to 0.7",
    "recurrent": "features that recur",
    "own": "own effect of E4, largest",
}


class Loop:
    """What training reads of a store, as the published loop shows it: ``distinct`` tokens of the split
    "train", drawn at random, again and again, beside as many rows of zeros if ``zeros``. ``rows``: their
    numbers in the store; -1 for zeros."""

    def __init__(self, store: Store | PlantedStore, distinct: int, zeros: bool, seed: int = 0):
        for name in ("models", "widths", "scales", "means"):
            setattr(self, name, getattr(store, name))
        chosen = np.sort(np.random.default_rng(seed).permutation(store.rows("train"))[:distinct])
        self.rows = np.append(chosen, np.full(len(chosen) if zeros else 0, -1))
        self.acts = [
            torch.cat([a.float(), a.new_zeros(len(self.rows) - len(chosen), a.shape[1]).float()])
            for a in store.activations(chosen)
        ]
        self.fingerprint = f"{store.fingerprint}, {distinct} tokens, zeros {zeros}, seed {seed}"

    def __len__(self) -> int:
        return len(self.rows)

    def count(self, split: str) -> int:
        return len(self.rows)

    def reader(
        self, split: str, batch_size: int, seed: int, epoch: int = 0, start: int = 0,
        memory: int | None = None, part: tuple[int, int] = (0, 1),
    ) -> Iterator[tuple[np.ndarray, list[torch.Tensor]]]:  # fmt: skip
        for some in shuffled(np.arange(len(self.rows)), batch_size, [seed, epoch], start, part):
            yield some, [a[torch.from_numpy(some)] for a in self.acts]


class AsPublished(Trainer):
    """``independent``: a feature begins with another direction in every model; ``rounded``: weights and
    Adam's moments are rounded to bfloat16 after every step, as where they are kept in it."""

    independent = rounded = False

    def __init__(self, store, config: TrainConfig, *how):
        super().__init__(store, config, *how)
        if self.independent:
            self.crosscoder.independent_rows(config.seed)
            self.crosscoder.centre([store.means[name] for name in store.models])

    def train_step(self, acts: list[torch.Tensor]) -> torch.Tensor:
        means = super().train_step(acts)
        if self.rounded:
            self.round()
        return means

    @torch.no_grad()
    def round(self) -> None:
        for parameter, own in self.optimizer.state.items():
            for values in (parameter, own["exp_avg"], own["exp_avg_sq"]):
                values.copy_(values.bfloat16())


def arms() -> Iterator[tuple[str, type[AsPublished], bool, bool]]:
    """(arm, its trainer, tokens repeated?, rows of zeros?), each with all changes before it."""
    changes: dict = {}
    for arm, change in ARMS.items():
        changes |= change
        of_trainer = {name: changes.get(name, False) for name in ("independent", "rounded")}
        trainer = type("AsPublished", (AsPublished,), of_trainer)
        yield arm, trainer, changes.get("repeated", False), changes.get("zeros", False)


@part_of_study("loop", 1)
def compute_loop(
    variant: Variant, seeds: int = 3, tokens: int = 0, planted_tokens: int = 250_000, targets: int = 100,
    k: float = 20.0,
) -> tuple[dict, dict]:  # fmt: skip
    """The part "loop": every arm on every store of STORES, with ``seeds`` seeds each.

    lambda is that at which the arm "l1" has the run's L0 (on the pair's, and on the planted store).
    ``tokens``: shown in a training, 0 for as many as to the run's crosscoders; ``planted_tokens``: of the
    planted store; ``targets``: positions per category of E4, ``k``: percent of the dictionary that is
    removed.

    Tables: "arms", one row per store, arm and seed (``measured``, and recurrent, the share of its features
    that recur with the other seeds); "own", ``summary`` of E4 by store, arm and seed; "match_l1". Metrics:
    ``pooled``."""
    config = variant.config()
    config = replace(config, tokens=tokens or config.tokens, variant="l1", precision="float32")
    others, null_store = variant.harvested("base", "null_a")
    stores = {"pair": variant.store, "null": null_store}
    stores["planted"] = PlantedStore(Planted(tokens=planted_tokens).null())
    pairs = {"pair": variant.pair, "null": others}
    rows, own, tries = [], [], []
    for name, store in stores.items():
        mine = _config(config, store)
        if name != "null":  # whose lambda is the pair's
            folder = variant.folder(f"loop/match_{name}")
            lam, tried = match_l1(store, mine.k, mine, folder, tolerance=0.1, most=6)
            tries.append(tried.assign(store=name))
        sites = models = None
        if name != "planted":
            sites = sample_targets(store, targets, "report", seed=variant.seed)
            models = open_models(pairs[name], store.models)
        for arm, trainer, repeated, zeros in arms():
            distinct = min(round(TOKENS_PER_FEATURE * mine.n_features), store.count("train"))
            made = []
            for seed in range(variant.seed, variant.seed + seeds):
                shown = Loop(store, distinct, zeros, seed) if repeated else store
                folder = variant.folder(f"loop/{name}_{arm.replace(' ', '_')}_{seed}")
                own_config = replace(mine, l1=lam, seed=seed)
                made.append(train(shown, own_config, folder, trainer_class=trainer))
            alive = [firing_frequency(c, store) > 0 for c in made]
            again = recurrent(made, alive).groupby("crosscoder")["recurrent"].mean()
            for number, (crosscoder, fires) in enumerate(zip(made, alive)):
                row = {"store": name, "arm": arm, "seed": number, "recurrent": again.get(number, 0.0)}
                rows.append(row | measured(crosscoder, store, fires, name != "planted"))
                if models:
                    effects = own_effects(store, crosscoder, models, sites, [k], variant.seed)
                    own.append(summary(effects, seed=variant.seed).assign(store=name, arm=arm, seed=number))
    tables = {"arms": pd.DataFrame(rows), "own": pd.concat(own), "match_l1": pd.concat(tries)}
    return pooled(tables["arms"], tables["own"]), tables


def _config(config: TrainConfig, store) -> TrainConfig:
    """For planted data the dictionary is 1.5 times what is planted, with the planted L0, and is shown the
    tokens three times."""
    if not isinstance(store, PlantedStore):
        return config
    size, k = round(1.5 * store.planted.features), max(1, round(store.planted.l0))
    return replace(config, n_features=size, k=k, tokens=min(config.tokens, 3 * store.count("train")))


def measured(crosscoder: CrossCoder, store, alive: np.ndarray, labelled: bool) -> dict[str, float]:
    """Of held-out tokens: fve_base, fve_distilled (the second model's, whichever it is), l0, dead. Of the
    alive features: nrn_mean, nrn_sd, one_sided (share with NRN outside 0.3 to 0.7); and where sentences have
    labels reasoning_highest, reasoning_lowest: how many of the ENDS by NRN have a label that names one of the
    four categories."""
    base, other = crosscoder.names
    card = health_card(crosscoder, store, n_boot=2)
    nrn = crosscoder.nrn(1, other, base).double().numpy()
    order = np.flatnonzero(alive)[np.argsort(nrn[alive], kind="stable")]
    row = {
        "fve_base": card[f"fve_{base}"]["value"],
        "fve_distilled": card[f"fve_{other}"]["value"],
        "l0": card["l0"]["value"],
        "dead": card["dead_fraction"]["value"],
        "alive": len(order),
        "nrn_mean": nrn[order].mean(),
        "nrn_sd": nrn[order].std(),
        "one_sided": ((nrn[order] < UNDER) | (nrn[order] > OVER)).mean(),
    }
    if labelled:
        n = max(1, round(ENDS * len(order)))
        labels = describe(store, codes(crosscoder, store, "report"))["label"]
        reasoning = labels.str.contains("|".join(CATEGORIES)).to_numpy()
        row["reasoning_highest"] = reasoning[order[-n:]].mean()
        row["reasoning_lowest"] = reasoning[order[:n]].mean()
    return row


def summary(effects: pd.DataFrame, n_boot: int = 300, seed: int = 0) -> pd.DataFrame:
    """Of ``own_effects``: one row per category, model and k: set, random, own, low, high (own, 95%, bootstrap
    over documents), n."""
    rows = []
    for (category, model, k), group in effects.groupby(["category", "model", "k"], sort=False):
        means = group[["set", "random", "own"]].mean()
        low, high = bootstrap(group["own"], groups=group["document"], n_boot=n_boot, seed=seed)
        ends = {"low": low, "high": high, "n": len(group)}
        rows.append({"category": category, "model": model, "k": k, **means, **ends})
    return pd.DataFrame(rows)


def pooled(table: pd.DataFrame, own: pd.DataFrame) -> dict[str, dict]:
    """Metrics <store>_<arm>_<quantity>, means over seeds with intervals over them, for the quantities of
    ``measured`` and recurrent; and ..._own, the own effect of E4 in the second model, that of the category in
    which it is largest (most negative), as its interval over seeds is over such extremes."""
    metrics, keys = {}, ["store", "arm"]
    for (store, arm), group in table.groupby(keys, sort=False):
        for name in group.columns.drop([*keys, "seed"]):
            if group[name].notna().all():
                each = [metric(value) for value in group[name]]
                metrics[f"{store}_{arm}_{name}".replace(" ", "_")] = pooled_metric(each)
    for (store, arm), group in _largest(own).groupby(keys, sort=False):
        metrics[f"{store}_{arm}_own".replace(" ", "_")] = pooled_metric([metric(v) for v in group["own"]])
    return metrics


def _largest(own: pd.DataFrame) -> pd.DataFrame:
    """The own effect in the second model, of the category in which it is largest: store, arm, seed, own."""
    second = own[own["model"] != "base"]
    return second.groupby(["store", "arm", "seed"], as_index=False, sort=False)["own"].min()


def plot(table: pd.DataFrame, own: pd.DataFrame) -> tuple[go.Figure, pd.DataFrame]:
    """(figure, its data): every quantity of SHOWN by arm, a colour per store; points are seeds."""
    long = table.merge(_largest(own), how="left").melt(["store", "arm", "seed"], list(SHOWN), "quantity")
    long = long.dropna().replace({"quantity": SHOWN})
    colours = dict(zip(STORES, (COLOURS["distilled"], COLOURS["null"], "#222222")))
    fig = px.strip(
        long, x="arm", y="value", color="store", facet_col="quantity", color_discrete_map=colours,
        category_orders={"arm": list(ARMS), "quantity": list(SHOWN.values())}, width=1300,
        title="What each part of the published loop changes", facet_col_spacing=0.05,
    )  # fmt: skip
    fig.update_traces(jitter=0.2, marker_size=5).update_yaxes(matches=None, showticklabels=True)
    return plain_titles(fig.update_xaxes(tickangle=35, title_text="").update_yaxes(title_text="")), long


def wide(table: pd.DataFrame, own: pd.DataFrame) -> pd.DataFrame:
    """Means over seeds: a row per store and arm."""
    table = table.merge(_largest(own), how="left").drop(columns="seed")
    return table.groupby(["store", "arm"], sort=False).mean()


def shows(part: Part) -> str:
    """What the loop changes, in words: each quantity as written and as run, on every store."""
    say = lambda store, arm, name: interval_text(part.metrics[f"{store}_{arm}_{name}"])
    each = lambda name: "; ".join(
        f"{store} {say(store, 'as_written', name)} and {say(store, 'as_run', name)}"
        for store in STORES
        if f"{store}_as_run_{name}" in part.metrics
    )
    return (
        f"As written and as run: explained variance, held out (second model) {each('fve_distilled')};"
        f" share of features with NRN outside 0.3 to 0.7 {each('one_sided')};"
        f" share of features that recur {each('recurrent')}; largest own effect of E4 {each('own')}."
    )


def finding(part: Part) -> str:
    """What the loop does, and which of two findings it makes by itself, in words: more one-sided features
    than as written where nothing was distilled; an own effect of E4 as large there as on the pair."""
    m = part.metrics
    compared = ("null_as_run_one_sided", "null_as_written_one_sided", "pair_as_run_own", "null_as_run_own")
    if any(None in (m[name]["ci"] or [None]) for name in compared):
        return "What the loop does is not testable, because a number has no interval."
    say = lambda store, arm, name: interval_text(m[f"{store}_{arm}_{name}"])
    sizes = lambda low, high: (0.0 if low < 0 < high else min(abs(low), abs(high)), max(abs(low), abs(high)))
    ends = lambda store, arm, name: sizes(*m[f"{store}_{arm}_{name}"]["ci"])
    more = ends("null", "as_run", "one_sided")[0] > ends("null", "as_written", "one_sided")[1]
    needs = ends("pair", "as_run", "own")[0] > ends("null", "as_run", "own")[1]
    of_arm = lambda arm: (say("pair", arm, "fve_distilled"), say("pair", arm, "recurrent"))
    each = {arm: of_arm(arm) for arm in ("as_written", "as_run")}
    return (
        f"Trained as run, {each['as_run'][0]} of the variance of new tokens is explained in place of"
        f" {each['as_written'][0]}, and {each['as_run'][1]} of the features recur in place of"
        f" {each['as_written'][1]}. One-sided features {'are' if more else 'are not'} made by the loop (null:"
        f" {say('null', 'as_run', 'one_sided')} as run, {say('null', 'as_written', 'one_sided')} as written);"
        f" E4's own effect {'needs the models' if needs else 'is not shown to need the models'} (pair"
        f" {say('pair', 'as_run', 'own')}, null {say('null', 'as_run', 'own')})."
    )


def elsewhere(pairs: Sequence[str], run: str = "default") -> str:
    """``finding`` of those of some pairs for which the arms were computed; "" if there is none."""
    parts = {pair: read_part(Run(pair, run), "loop") for pair in pairs}
    return " ".join(f"On `{pair}`: {finding(part)}" for pair, part in parts.items() if part)
