"""What notebook 04 needs of a run: the models, opened to be changed, and what notebooks 01 to 03 left."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
from nnsight import TransformersModel
from transformers import PreTrainedTokenizerBase

from ..activations.store import Store
from ..crosscoder import seeds
from ..crosscoder.codes import codes
from ..crosscoder.model import CrossCoder
from ..crosscoder.training import TrainConfig
from ..features.table import feature_table, open_artefacts_of_all
from ..features.uniqueness import beyond, of_seed
from ..models.pairs import Pair, load_pair
from ..models.reader import open_models
from ..results import Part, read_part
from ..runs import MANIFEST, Run, fingerprint, kept_table, read_manifest
from . import ablation, steer
from .tasks import Medium, medium_of


@dataclass(frozen=True)
class RunArtefacts:
    """``table``: one row per feature; ``chosen`` {category: feature}; ``fingerprint``: the crosscoder's;
    ``models`` {name: model}, on NDIF's servers if the pair is remote; ``medium``: how this pair is asked.
    ``number``: of the crosscoder among the run's; ``others``: the rest, for the first."""

    run: Run
    pair: Pair
    store: Store
    crosscoder: CrossCoder
    table: pd.DataFrame
    chosen: dict[str, int]
    fingerprint: str
    tokenizer: PreTrainedTokenizerBase
    models: dict[str, TransformersModel]
    medium: Medium
    number: int = 0
    others: tuple[RunArtefacts, ...] = ()

    @property
    def each(self) -> tuple[RunArtefacts, ...]:
        """One for each crosscoder of the run."""
        return replace(self, others=()), *self.others

    def describe(self) -> pd.DataFrame:
        """The models: layer that is read, width, mean residual norm (the unit of strengths)."""
        store = self.store
        columns = {"layer read": store.layers, "width": store.widths, "mean residual norm": store.mean_norms}
        return pd.DataFrame(columns).loc[list(self.crosscoder.names)].round(2).rename_axis("model")

    def words(self, rows: slice) -> str:
        """The tokens of some rows of the store, as text."""
        return " ".join(self.tokenizer.convert_ids_to_tokens(self.store.tokens[rows].tolist()))

    def unique(self, null: Part) -> np.ndarray:
        """Features that recur in other crosscoders and whose nu_eps lies beyond the limit of the null's
        crosscoder of this number; none without a ``null`` (part "nulls") or other crosscoders."""
        if not null or "recurrent" not in self.table:
            return np.empty(0, dtype=int)
        hits = beyond(self.table, of_seed(null.tables["thresholds"], self.number), "nu_eps")
        return self.table.loc[hits & self.table["recurrent"], "feature"].to_numpy(int)

    def null(self) -> tuple[Part, str]:
        """(the part "nulls" of the study, why no set of unique features can be taken; "" if it can)."""
        null = read_part(self.run, "nulls", crosscoder=self.fingerprint)
        if not null:
            return null, f"the null has not been computed for these crosscoders ({null.note.rstrip('.')})"
        if not self.others:
            return null, "there is one crosscoder only, and nothing says which of its features recur"
        if not all(len(one.unique(null)) for one in self.each):
            return null, "in some crosscoder no recurrent feature lies beyond the null"
        return null, ""

    def upper(self) -> tuple[RunArtefacts | None, str]:
        """(the same at the layer before the last block, ""), or (None, why it cannot be tested).

        Notebook 01 keeps the activations of that layer in the run's folder ``store_upper``. As many
        crosscoders as the run has, of the same configuration, are read, copied from the repository, or
        trained. Their tables are measured on the split "choose" alone."""
        run, folder = self.run, self.run.path("store_upper")
        if not (folder / MANIFEST).is_file():
            return None, "the run has no activations of that layer (notebook 01, upper_layer)"
        store, own = Store.open(folder), run.path("crosscoder")
        read = {m: store.manifest["models"][m]["fingerprint"] for m in store.models}
        if store.manifest["corpus"] != self.store.manifest["corpus"] or any(
            self.pair.fingerprint(m) != made_from for m, made_from in read.items()
        ):
            why = "the activations of that layer were harvested from other text or weights (notebook 01)"
            return None, why
        if not (own / MANIFEST).is_file() or seeds.content(CrossCoder.load(own)) != self.fingerprint:
            return None, "the crosscoder is from elsewhere, and there is none of that layer"
        config = TrainConfig(**read_manifest(own, seeds.MADE_BY)["config"])
        n, each = len(self.each), []
        for number, crosscoder in enumerate(seeds.train_all(store, config, run, n, name="crosscoder_upper")):
            content = seeds.content(crosscoder)

            def compute(crosscoder=crosscoder) -> pd.DataFrame:
                chosen = codes(crosscoder, store, "choose")
                return feature_table(crosscoder, store, chosen, chosen)

            key = fingerprint("upper features", 1, store.fingerprint, content)
            table = kept_table(run.path("steering") / f"features_upper_{number}", key, compute)
            parts = {"store": store, "crosscoder": crosscoder, "table": table, "fingerprint": content}
            each.append(replace(self, **parts, chosen={}, number=number, others=()))
        return replace(each[0], others=tuple(each[1:])), ""

    def sets(self, targets: pd.DataFrame, n: int, null: Part) -> list[list[ablation.Removal]]:
        """For each crosscoder the sets that mean something (``ablation.plan_sets``): unique features, and the
        ``n`` features attributed to each category on ``targets``, of the split "choose"."""
        model, layers = self.models["distilled"], self.store.layers
        decided_by = (targets.to_dict("list"), dict(layers), [one.fingerprint for one in self.each])

        def compute() -> pd.DataFrame:
            crosscoders, how = [one.crosscoder for one in self.each], {"remote": self.pair.remote}
            found = ablation.attribution(self.store, crosscoders, model, targets, **how)
            frames = [pd.DataFrame(values).assign(crosscoder=i) for i, values in enumerate(found)]
            return pd.concat(frames, ignore_index=True)

        key = fingerprint("attribution", 1, self.store.fingerprint, *decided_by)
        table = kept_table(self.run.path("steering") / "attribution", key, compute, "attribution")
        removals = []
        for one, (_, values) in zip(self.each, table.groupby("crosscoder")):
            attributions = {c: values[c].to_numpy() for c in targets["category"].unique()}
            features = ablation.attributed_features(attributions, n)
            removals.append(ablation.plan_sets(one.table, one.unique(null), features))
        return removals

    def ablate(
        self,
        targets: pd.DataFrame,
        removals: Sequence[Sequence[ablation.Removal]],
        random_draws: int = 2,
        seed: int = 0,
    ) -> tuple[list[pd.DataFrame], str]:
        """(``ablation.measure`` on these models for each crosscoder with its ``removals``, kept in the run's
        folder; the fingerprint of what decides it)."""
        effects, keys, intact = [], [], {}
        for one, own in zip(self.each, removals, strict=True):
            decided_by = (list(own), targets.to_dict("list"), random_draws, seed)
            keys.append(fingerprint("ablation", 2, self.store.fingerprint, one.fingerprint, *decided_by))

            def compute(one=one, own=own) -> pd.DataFrame:
                opened, how = (self.store, one.crosscoder, self.models), {"remote": self.pair.remote}
                return ablation.measure(*opened, targets, own, random_draws, seed, intact=intact, **how)

            folder = self.run.path("steering") / (f"ablation_{one.number}" if one.number else "ablation")
            effects.append(kept_table(folder, keys[-1], compute, "effects"))
        return effects, fingerprint(keys)

    def steering(
        self, max_new_tokens: int = 250, temperature: float = 1.0, seed: int = 0, place: str = "thinking"
    ) -> steer.Steering:
        """The distilled model under steering at the layer of this store; its transcripts are kept in the
        run's folder."""
        model, layer = self.models["distilled"], self.store.layers["distilled"]
        kept = (self.run.path("steering"), self.pair.fingerprint("distilled"))
        how = {"medium": self.medium, "remote": self.pair.remote, "place": place}
        return steer.Steering(model, layer, *kept, max_new_tokens, temperature, seed, **how)


def open_run(run: Run, source: str = "", facts: Mapping | None = None) -> RunArtefacts:
    """All crosscoders of a run, the first one in front. ``source`` and ``facts``: of a crosscoder that was
    trained elsewhere (``crosscoder.sharing``), which is then the only one. UserError says which notebook is
    missing."""
    pair = load_pair(run.pair)
    store, artefacts = open_artefacts_of_all(run, pair, source, facts)
    tokenizer = pair.tokenizer()
    models = open_models(pair, artefacts[0].crosscoder.names)
    first, *others = (
        RunArtefacts(
            run, pair, store, one.crosscoder, one.table, one.chosen, one.fingerprint, tokenizer, models,
            medium_of(pair, tokenizer), number,
        )
        for number, one in enumerate(artefacts)
    )  # fmt: skip
    return replace(first, others=tuple(others))
