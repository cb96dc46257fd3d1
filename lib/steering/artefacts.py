"""What notebook 04 needs of a run: the models, opened to be changed, and what notebooks 01 to 03 left."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pandas as pd
from nnsight import TransformersModel
from transformers import PreTrainedTokenizerBase

from ..activations.store import Store
from ..crosscoder.model import CrossCoder
from ..features.table import open_artefacts
from ..models.pairs import Pair, load_pair
from ..models.reader import open_models
from ..runs import Run, fingerprint, kept_table
from . import ablation, steer
from .tasks import Medium, medium_of


@dataclass(frozen=True)
class RunArtefacts:
    """``table``: one row per feature; ``chosen`` {category: feature}; ``fingerprint``: the crosscoder's;
    ``models`` {name: model}, on NDIF's servers if the pair is remote; ``medium``: how this pair is asked."""

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

    def describe(self) -> pd.DataFrame:
        """The models: layer that is read, width, mean residual norm (the unit of strengths)."""
        store = self.store
        columns = {"layer read": store.layers, "width": store.widths, "mean residual norm": store.mean_norms}
        return pd.DataFrame(columns).loc[list(self.crosscoder.names)].round(2).rename_axis("model")

    def words(self, rows: slice) -> str:
        """The tokens of some rows of the store, as text."""
        return " ".join(self.tokenizer.convert_ids_to_tokens(self.store.tokens[rows].tolist()))

    def ablate(
        self,
        targets: pd.DataFrame,
        removals: Sequence[ablation.Removal],
        random_draws: int = 2,
        seed: int = 0,
    ) -> tuple[pd.DataFrame, str]:
        """(``ablation.measure`` on these models, kept in the run's folder; the fingerprint of what decides
        it)."""
        decided_by = (removals, targets.to_dict("list"), random_draws, seed)
        key = fingerprint(self.store.fingerprint, self.fingerprint, *decided_by)

        def compute() -> pd.DataFrame:
            opened, how = (self.store, self.crosscoder, self.models), {"remote": self.pair.remote}
            return ablation.measure(*opened, targets, removals, random_draws, seed, **how)

        return kept_table(self.run.path("steering") / "ablation", key, compute, "effects"), key

    def steering(self, max_new_tokens: int = 250, temperature: float = 1.0, seed: int = 0) -> steer.Steering:
        """The distilled model under steering; its transcripts are kept in the run's folder."""
        model, layer = self.models["distilled"], self.store.layers["distilled"]
        kept = (self.run.path("steering"), self.pair.fingerprint("distilled"))
        how = {"medium": self.medium, "remote": self.pair.remote}
        return steer.Steering(model, layer, *kept, max_new_tokens, temperature, seed, **how)


def open_run(run: Run, source: str = "", facts: Mapping | None = None) -> RunArtefacts:
    """``source`` and ``facts``: of a crosscoder that was trained elsewhere (``crosscoder.sharing``).
    UserError says which notebook is missing."""
    pair = load_pair(run.pair)
    opened = open_artefacts(run, pair, source, facts)
    tokenizer = pair.tokenizer()
    models = open_models(pair, opened[1].names, tokenizer)
    return RunArtefacts(run, pair, *opened, tokenizer, models, medium_of(pair))
