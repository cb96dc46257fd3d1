"""E2 as in the paper: a language model names features from their contexts, and the names are put to the test.

**Any OpenAI-compatible endpoint.** ``LABEL_URL`` (https://api.openai.com/v1, http://localhost:8000/v1, ...),
``LABEL_MODEL`` (the name that the server knows), ``LABEL_KEY`` (if it wants one). The key is sent to this
address only, in a header, and is written nowhere. A server of your own::

    pip install "transformers[serving]"; transformers serve Qwen/Qwen2.5-7B-Instruct --port 8000
    LABEL_URL=http://localhost:8000/v1 LABEL_MODEL=Qwen/Qwen2.5-7B-Instruct make figures ONLY=03

**A label is a guess, its score is the evidence.** Contexts to label come from the split "choose". On the
split "report" the model is shown k texts in which the feature fires and k of the same kind in which it does
not, shuffled, and says which of them fit the label. The score is a balanced accuracy, 0.5 by chance::

    score = (share of firing texts it picks + share of silent texts it leaves) / 2

The control asks for the same texts with another feature's label: what a label earns that fits anything is in
both. Two features with the same label control each other badly, so the control can only be too high.

Every answer is a line of ``answers.jsonl``: an interrupted run goes on where it stopped.

Sources: Baek & Tegmark 2025 (arXiv 2503.03730), labels by GPT-4o-mini; detection scoring: Paulo et al. 2024
(arXiv 2410.13928)."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import field
from functools import partial
from pathlib import Path

import httpx
import numpy as np
import pandas as pd
from transformers import PreTrainedTokenizerBase

from ..activations.store import Store
from ..labels import CATEGORIES
from ..results import Results
from ..runs import Progress, disk_error, exclusive
from ..settings import Positive, UserError, check, number, parameters
from ..stats import bootstrap
from ..text.tables import table
from .contexts import firings, top_contexts, window
from .table import Inspection

ANSWERS = "answers.jsonl"
NONE = "none"  # the category of a feature that is about none of the four
BEFORE, AFTER = 24, 8  # tokens shown on either side
TRIES, WAIT = 5, 2.0  # requests at most for one answer; seconds before the second, doubled each time
PATIENCE = 20  # so many unreadable answers, and none that can be read: the model cannot do it
LABELLED = ["feature", "label", "category", "confidence", "parsed", "raw"]
JUDGED = ["feature", "row", "document", "fires", "text"]
SCORED = ["feature", "label", "other", "texts", "score", "parsed", "control", "parsed_control"]
PROMPTS = table("naming")


def excerpt(store: Store, tokenizer: PreTrainedTokenizerBase, row: int, marked: bool) -> str:
    """The text around a row of the store, as it is spelled, on one line; its token in « » if ``marked``."""
    rows = window(store, row, BEFORE, AFTER)
    ids, at = store.tokens[rows].tolist(), int(np.searchsorted(rows, row))
    left, upto, text = (
        tokenizer.decode(ids[:i], clean_up_tokenization_spaces=False) for i in (at, at + 1, len(ids))
    )
    if marked and upto.startswith(left) and text.startswith(upto) and upto != left:
        token = upto[len(left) :]
        # the space before a word is not marked
        gap = token[: len(token) - len(token.lstrip())] if token.strip() else ""
        text = f"{left}{gap}«{token[len(gap) :]}»{text[len(upto) :]}"
    elif marked:  # a part of a character, say: token by token
        words = tokenizer.convert_ids_to_tokens(ids)
        text = " ".join(f"«{word}»" if i == at else word for i, word in enumerate(words))
    return text.replace("\n", "⏎")


def contexts_to_label(
    store: Store, coded, tokenizer: PreTrainedTokenizerBase, features: Sequence[int], n: int = 8
) -> pd.DataFrame:
    """``contexts.top_contexts`` in plain text; ``coded``: the codes of the split "choose"."""
    shown = top_contexts(store, coded, tokenizer, features, n)
    return shown.assign(text=[excerpt(store, tokenizer, row, marked=True) for row in shown["row"]])


def contexts_to_judge(
    store: Store,
    coded,
    tokenizer: PreTrainedTokenizerBase,
    features: Sequence[int],
    k: int = 5,
    seed: int = 0,
) -> pd.DataFrame:
    """For each feature up to ``k`` texts in which it fires and as many in which it does not: columns
    ``JUDGED``, shuffled.

    ``coded`` is of the split "report". Firing texts are drawn from all firings, not only the strongest, one
    per document; a silent text is drawn for each from the same kind of text (trace or general) and holds no
    firing. No text comes twice. Nothing is marked."""
    check("k", k, int, low=1)
    columns, kinds, lines = coded.codes.tocsc(), store.labels["kind"], []
    # where documents begin
    edges = np.array([0, *(np.flatnonzero(np.diff(store.documents)) + 1), len(store)])
    for feature in features:
        rng, seen, texts = np.random.default_rng((seed, int(feature))), set(), []
        fires = np.sort(firings(coded.rows, columns, feature)[0])
        candidates = coded.rows[rng.permutation(len(coded.rows))]
        document = np.searchsorted(edges, candidates, side="right")  # silent: no firing in the text around
        first = np.searchsorted(fires, np.maximum(candidates - BEFORE, edges[document - 1]))
        last = np.searchsorted(fires, np.minimum(candidates + AFTER + 1, edges[document]))
        candidates = candidates[first == last]
        firing = rng.permutation(fires)
        firing = firing[np.sort(np.unique(store.documents[firing], return_index=True)[1])]
        for row in firing[: 20 * k].tolist():
            text = excerpt(store, tokenizer, row, marked=False)
            if len(texts) == 2 * k or text in seen:
                continue
            for other in candidates[kinds[candidates] == kinds[row]][:1000].tolist():
                silent = excerpt(store, tokenizer, other, marked=False)
                if silent not in seen | {text}:
                    texts += [(row, True, text), (other, False, silent)]
                    seen |= {text, silent}
                    break
        for row, is_firing, text in (texts[i] for i in rng.permutation(len(texts))):
            lines.append((int(feature), row, int(store.documents[row]), is_firing, text))
    return pd.DataFrame(lines, columns=JUDGED)


def label_features(
    contexts: pd.DataFrame, features: Sequence[int], folder: str | Path, endpoint: Endpoint
) -> pd.DataFrame:
    """One row per feature that has contexts (columns feature, rank, text): ``LABELLED``.

    ``category`` is one of the four or "none", ``confidence`` is 0 to 1, by the model's own word. An answer
    that cannot be read, after one reminder, stays in ``raw`` with ``parsed`` False and no label. UserError if
    the endpoint fails, or nothing it says can be read."""
    texts = {feature: group.sort_values("rank")["text"] for feature, group in contexts.groupby("feature")}
    asked = [int(f) for f in features if f in texts]
    prompts = [PROMPTS["label_prompt"].format(texts=_numbered(texts[f])) for f in asked]
    questions = [(prompt, PROMPTS["label_reminder"], read_label) for prompt in prompts]
    rows = []
    for feature, (answer, raw) in zip(asked, _ask_all("features labelled", questions, folder, endpoint)):
        rows.append((feature, *(answer or ("", "", math.nan)), answer is not None, raw))
    return pd.DataFrame(rows, columns=LABELLED).astype({"confidence": float, "parsed": bool})


def read_label(text: str) -> tuple[str, str, float] | None:
    """(label, category, confidence) from an answer: the last JSON object in it that has them, whatever stands
    around it; None if none has."""
    last, decoder = None, json.JSONDecoder()
    for place in re.finditer(r"\{", text):
        try:
            entry = decoder.raw_decode(text, place.start())[0]
            label, category = entry["label"].strip(), str(entry["category"]).strip().lower()
            confidence = float(entry["confidence"])
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            continue
        if label and category in (*CATEGORIES, NONE) and 0 <= confidence <= 1:
            last = (label, category, confidence)
    return last


def score_labels(
    labels: pd.DataFrame, contexts: pd.DataFrame, folder: str | Path, endpoint: Endpoint, seed: int = 0
) -> pd.DataFrame:
    """Detection scores of ``labels`` (``label_features``) on ``contexts`` (``contexts_to_judge``): one row
    per label, ``SCORED``.

    ``score`` is the balanced accuracy with the feature's own label, ``control`` with the label of the feature
    ``other`` (a seeded permutation that leaves no feature its own; -1 and NaN where there is only one). NaN
    where an answer could not be read."""
    groups = dict(list(contexts.groupby("feature")))
    label_of = {int(r.feature): r.label for r in labels.itertuples() if r.parsed and r.feature in groups}
    features = list(label_of)
    ring = [features[i] for i in np.random.default_rng(seed).permutation(len(features))]
    other = {f: ring[i - 1] if len(ring) > 1 else -1 for i, f in enumerate(ring)}
    asked = [(f, labelled) for f in features for labelled in (f, other[f]) if labelled != -1]
    questions = []
    for f, labelled in asked:
        n, texts = len(groups[f]), _numbered(groups[f]["text"])
        prompt = PROMPTS["judge_prompt"].format(label=label_of[labelled], n=n, texts=texts)
        questions.append((prompt, PROMPTS["judge_reminder"].format(n=n), partial(read_numbers, n=n)))
    answers = dict(zip(asked, _ask_all("labels scored", questions, folder, endpoint)))
    rows = []
    for f in features:
        fires = groups[f]["fires"].to_numpy()
        score, control = (
            balanced_accuracy(fires, answers.get((f, labelled), (None, ""))[0]) for labelled in (f, other[f])
        )
        parsed, parsed_control = not math.isnan(score), not math.isnan(control)
        rows.append((f, label_of[f], other[f], len(fires), score, parsed, control, parsed_control))
    kinds = {"score": float, "parsed": bool, "control": float, "parsed_control": bool}
    return pd.DataFrame(rows, columns=SCORED).astype(kinds)


def read_numbers(text: str, n: int) -> list[int] | None:
    """The last JSON list of whole numbers in an answer; None without one, or with one not from 1 to ``n``."""
    lists = re.findall(r"\[\s*(?:\d+\s*(?:,\s*\d+\s*)*)?\]", text)
    numbers = json.loads(re.sub(r"\b0+(?=\d)", "", lists[-1])) if lists else [0]
    return sorted(set(numbers)) if all(1 <= i <= n for i in numbers) else None


def balanced_accuracy(fires: np.ndarray, picked: Sequence[int] | None) -> float:
    """Mean of the shares of firing texts that were picked and of silent texts that were not; ``picked``
    counts from 1. NaN for None."""
    if picked is None or fires.all() or not fires.any():
        return math.nan
    is_picked = np.isin(np.arange(1, len(fires) + 1), picked)
    return float((is_picked[fires].mean() + (~is_picked[~fires]).mean()) / 2)


def summary(scores: pd.DataFrame, n_boot: int = 1000, seed: int = 0) -> pd.DataFrame:
    """Means over features of score, control and their difference (of features that have both): columns value,
    low, high (95% bootstrap over features), n. NaN where nothing could be read."""
    columns = {"own label": scores["score"], "another's label": scores["control"]}
    columns["difference"] = scores["score"] - scores["control"]
    rows = {}
    for name, values in columns.items():
        values = values.dropna()
        rows[name] = (values.mean(), *bootstrap(values, n_boot=n_boot, seed=seed), len(values))
    return pd.DataFrame.from_dict(rows, orient="index", columns=["value", "low", "high", "n"])


def record(
    results: Results,
    inspection: Inspection,
    groups: Mapping[str, pd.DataFrame],
    n_boot: int = 1000,
    seed: int = 0,
) -> tuple[pd.DataFrame | None, str]:
    """Names and scores of the features with the highest and the lowest NRN (``table.extremes``), put into
    ``results``: (labels with scores, a sentence about them). (None, why not) if no endpoint is set, or it
    fails.

    Metrics label_score, label_control, label_difference; tables labels, label_categories."""
    endpoint = endpoint_from_environment()
    if endpoint is None:
        return None, "Not asked: no endpoint is set (`LABEL_URL`, see above). Nothing else depends on it."
    store, tokenizer, folder = inspection.store, inspection.tokenizer, results.run.path("labels")
    group = {int(f): name for name in ("highest", "lowest") for f in groups[name]["feature"]}
    features = list(group)
    try:
        shown = contexts_to_label(store, inspection.choose, tokenizer, features)
        named = label_features(shown, features, folder, endpoint)
        judged = contexts_to_judge(store, inspection.report, tokenizer, features, seed=seed)
        scored = score_labels(named, judged, folder, endpoint, seed)
    except UserError as error:  # a server that went away, or a model too small to write JSON
        return None, f"**No names:** {error}"
    names = {"own label": "score", "another's label": "control"}
    for name, row in summary(scored, n_boot, seed).rename(index=names).iterrows():
        results.add(f"label_{name}", row["value"], (row["low"], row["high"]), int(row["n"]))
    named.insert(0, "group", named["feature"].map(group))
    named = named.drop(columns="raw").merge(scored[["feature", "score", "control"]], on="feature", how="left")
    results.table("labels", named.round(4))
    parsed = named[named["parsed"]]
    results.table("label_categories", pd.crosstab(parsed["category"], parsed["group"]).reset_index())
    note = (
        f"{endpoint.model} named {len(parsed)} of {len(named)} features; detection"
        f" {results.text('label_score')}, with another's name {results.text('label_control')}, difference"
        f" {results.text('label_difference')}."
    )
    return named, note


@parameters
class Endpoint:
    """An OpenAI-compatible chat endpoint: ``url`` up to and with /v1. ``timeout`` in seconds, ``max_tokens``
    of one answer."""

    url: str
    model: str
    key: str = field(default="", repr=False)
    timeout: number(0.01) = 120.0
    max_tokens: Positive = 500

    def __post_init__(self) -> None:
        if not re.match(r"https?://[^/\s]+", self.url):
            raise UserError(
                f"LABEL_URL is {self.url!r}: it must be the address of an OpenAI-compatible endpoint, "
                "such as http://localhost:8000/v1"
            )
        if not self.model:
            raise UserError(
                "LABEL_MODEL is not set: it must be the name of a model that the endpoint LABEL_URL knows"
            )
        if not re.fullmatch(r"[!-~]*", self.key):
            raise UserError("LABEL_KEY holds characters that no key has: copy it again")


def endpoint_from_environment(**options) -> Endpoint | None:
    """The endpoint that LABEL_URL, LABEL_MODEL and LABEL_KEY name; None if LABEL_URL is not set. ``options``:
    timeout, max_tokens."""
    url, model, key = (os.environ.get(f"LABEL_{name}", "").strip() for name in ("URL", "MODEL", "KEY"))
    return Endpoint(url, model, key, **options) if url else None


def _ask_all(
    what: str, questions: Sequence[tuple[str, str, Callable]], folder: str | Path, endpoint: Endpoint
) -> list[tuple[object, str]]:
    """For each (prompt, reminder, reader): (what ``reader`` made of the answer or None, the answer), with one
    reminder after an answer that it cannot read."""
    if endpoint is None:
        raise UserError(
            "no endpoint is set: set LABEL_URL (such as http://localhost:8000/v1), LABEL_MODEL and, if it"
            " wants one, LABEL_KEY"
        )
    Path(folder).mkdir(parents=True, exist_ok=True)
    with exclusive(Path(folder), "asking a language model"), Progress(what, len(questions)) as progress:
        answers, results = _Answers(Path(folder) / ANSWERS, endpoint), []
        for i, question in enumerate(questions, 1):
            results.append(answers.ask(*question))
            if i >= min(PATIENCE, len(questions)) and all(answer is None for answer, _ in results):
                raise UserError(
                    f"none of {i} answers of {endpoint.model} can be read (the last one began"
                    f" {results[-1][1][:80]!r}): use a model that follows instructions"
                )
            progress.update(i)
    return results


class _Answers:
    """Answers by conversation, asked for once: a line {prompt, model, answer} each in ``file``."""

    def __init__(self, file: Path, endpoint: Endpoint):
        self.file, self.endpoint, self.known = file, endpoint, {}
        self.options = {"temperature": 0, "max_tokens": endpoint.max_tokens}
        text = file.read_text(encoding="utf-8", errors="replace") if file.is_file() else ""
        for line in text.split("\n"):
            try:  # a line that an interruption cut short is passed over
                entry = json.loads(line)
                self.known[entry["prompt"], entry["model"]] = entry["answer"]
            except (ValueError, KeyError, TypeError):
                continue
        self.cut = bool(text) and not text.endswith("\n")

    def ask(self, prompt: str, reminder: str, reader: Callable) -> tuple[object, str]:
        messages = [{"role": "user", "content": prompt}]
        for _ in range(2):
            raw = self._answer(messages)
            answer = reader(raw.rpartition("</think>")[2])  # what a reasoning model thinks is not its answer
            if answer is not None:
                break
            messages += [{"role": "assistant", "content": raw}, {"role": "user", "content": reminder}]
        return answer, raw

    def _answer(self, messages: list[dict]) -> str:
        conversation = json.dumps([messages, self.endpoint.max_tokens]).encode()
        name = hashlib.sha256(conversation).hexdigest()[:32], self.endpoint.model
        if name not in self.known:
            answer = _request(self.endpoint, messages, self.options)
            line = json.dumps({"prompt": name[0], "model": name[1], "answer": answer})
            try:
                with self.file.open("a", encoding="utf-8") as file:
                    file.write("\n" * self.cut + line + "\n")
            except OSError as error:
                raise disk_error(self.file, error) from error
            self.known[name], self.cut = answer, False
        return self.known[name]


def _request(endpoint: Endpoint, messages: list[dict], options: dict) -> str:
    """The text that the endpoint answers. What passes (429, 5xx, a timeout) is tried again; so is what the
    endpoint refuses for one of the ``options``, without it (``_without_refused``); all else is a UserError at
    once. A redirect is not followed: it would carry the key to another address."""
    url = endpoint.url.rstrip("/") + "/chat/completions"
    headers = {"Authorization": f"Bearer {endpoint.key}"} if endpoint.key else {}
    post = dict(headers=headers, timeout=endpoint.timeout, follow_redirects=False)
    attempt = 0
    while attempt < TRIES:
        wait = WAIT * 2**attempt
        try:
            body = {"model": endpoint.model, "messages": messages, **options, "stream": False}
            response = httpx.post(url, json=body, **post)
        except (httpx.ConnectError, httpx.InvalidURL) as error:
            raise UserError(
                f"nothing answers at {endpoint.url} ({error}): start the server, or correct LABEL_URL;"
                " answers so far are kept"
            ) from None
        except httpx.TimeoutException:
            problem = f"no answer within {endpoint.timeout:g} s"
        except httpx.TransportError as error:
            problem = type(error).__name__
        else:
            status = response.status_code
            if response.is_success:
                return _content(response.content, endpoint)
            if status in (401, 403):
                raise UserError(
                    f"{endpoint.url} refuses the key (status {status}): set LABEL_KEY to one that it knows"
                )
            words = " ".join(response.text[:2000].replace(endpoint.key or "\0", "***").split())[:200]
            problem = f"status {status}" + (f" ({words})" if words else "")
            if status in (400, 422) and _without_refused(options, response.text):
                continue
            if status not in (408, 429) and status < 500:
                raise UserError(
                    f"{url} cannot be used, {problem}: LABEL_URL must be an OpenAI-compatible endpoint up to"
                    f" /v1, and LABEL_MODEL ({endpoint.model}) a model it knows"
                )
            after = response.headers.get("Retry-After", "")
            wait = max(wait, min(float(after), 60.0)) if after.isdigit() else wait
        attempt += 1
        if attempt < TRIES:
            time.sleep(wait)
    raise UserError(
        f"{endpoint.url} failed {TRIES} times, the last time with {problem}: answers so far are kept, run it"
        " again later"
    )


def _without_refused(options: dict, words: str) -> bool:
    """Change ``options`` to what an endpoint takes, if it says that it refuses one of them: newer models know
    max_tokens as max_completion_tokens, and no temperature but their own."""
    if "max_tokens" in options and re.search(r"\bmax_tokens\b", words):
        options["max_completion_tokens"] = options.pop("max_tokens")
        return True
    return bool(re.search(r"\btemperature\b", words) and options.pop("temperature", None) is not None)


def _content(body: bytes, endpoint: Endpoint) -> str:
    try:
        content = json.loads(body)["choices"][0]["message"]["content"] or ""
        return content if isinstance(content, str) else "".join(part.get("text") or "" for part in content)
    except (ValueError, KeyError, IndexError, TypeError, AttributeError):
        raise UserError(
            f"{endpoint.url} answers, but not as an OpenAI-compatible chat endpoint does: correct LABEL_URL"
        ) from None


def _numbered(texts: Sequence[str]) -> str:
    return "\n".join(f"{i}. {text}" for i, text in enumerate(texts, 1))
