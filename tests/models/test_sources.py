"""Commits on the hub, resolved once and then required; streams of data sets. The hub is a fake: nothing here
leaves the machine.
"""

import json
from pathlib import Path
from types import SimpleNamespace

import datasets
import httpx
import pytest
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

from lib.models import sources
from lib.models.pairs import Pair, load_pair
from lib.settings import UserError

A, B = "a" * 40, "b" * 40


class Hub:
    """Names a commit for what is asked, and counts how often it was asked."""

    def __init__(self, commit=A, error=None, files=()):
        self.commit, self.error, self.files, self.asked = commit, error, files, []

    def __call__(self):
        return self

    def model_info(self, repo, revision=None, **_):
        self.asked.append((repo, revision))
        if self.error:
            raise self.error
        return SimpleNamespace(
            sha=self.commit, siblings=[SimpleNamespace(rfilename=n, size=s) for n, s in self.files]
        )

    dataset_info = model_info


@pytest.fixture
def fake(monkeypatch, tmp_path):
    monkeypatch.setattr(sources, "REVISIONS", tmp_path / "revisions.json")
    fake = Hub()
    monkeypatch.setattr(sources, "HfApi", fake)
    return fake


def response(status):
    return httpx.Response(status, request=httpx.Request("GET", "https://huggingface.co/api"))


def test_a_commit_is_asked_for_once_recorded_and_then_required(fake):
    assert sources.resolved("org/name") == ("org/name", A)
    assert json.loads(sources.REVISIONS.read_text()) == {"models": {"org/name": A}}
    fake.commit = B  # the branch moves on
    assert sources.resolved("org/name") == ("org/name", A)
    assert fake.asked == [("org/name", None)]


def test_models_and_datasets_of_one_name_are_two_things(fake):
    sources.resolved("org/name")
    fake.commit = B
    assert sources.resolved("org/name", "dataset") == ("org/name", B)
    assert json.loads(sources.REVISIONS.read_text()) == {
        "datasets": {"org/name": B},
        "models": {"org/name": A},
    }


def test_a_recorded_commit_needs_no_network(fake):
    sources.resolved("org/name")
    fake.error = httpx.ConnectError("no route to host")
    assert sources.resolved("org/name") == ("org/name", A)
    with pytest.raises(
        UserError,
        match="cannot be asked for the model org/other .no route to host., and no commit of it is recorded",
    ):
        sources.resolved("org/other")
    assert "org/other" not in sources.REVISIONS.read_text()


def test_a_pin_is_not_asked_for_and_another_record_is_an_error(fake):
    assert sources.resolved(f"org/name@{A}") == ("org/name", A) and not fake.asked
    assert sources.resolved("org/name") == ("org/name", A) and not fake.asked
    with pytest.raises(UserError, match=f"pins org/name to {B}, and revisions.json records {A}"):
        sources.resolved(f"org/name@{B}")


def test_a_tag_is_resolved_like_a_branch(fake):
    assert sources.resolved("org/name@v1.0") == ("org/name", A)
    fake.commit = B
    assert sources.resolved("org/name@v1.0") == ("org/name", A) and sources.resolved("org/name") == (
        "org/name",
        B,
    )
    assert fake.asked == [("org/name", "v1.0"), ("org/name", None)]


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (
            GatedRepoError("403 Forbidden", response=response(403)),
            "is gated: accept its licence at https://huggingface.co/org/name",
        ),
        (RepositoryNotFoundError("404", response=response(404)), "has no model org/name that you may read"),
        (
            OSError("Temporary failure\nin name resolution"),
            "cannot be asked for the model org/name .Temporary failure., and",
        ),
    ],
)
def test_errors_of_the_hub_are_one_sentence(fake, error, words):
    fake.error = error
    with pytest.raises(UserError, match=words) as raised:
        sources.resolved("org/name")
    assert "\n" not in str(raised.value)


def test_what_is_no_commit_is_never_recorded_or_believed(fake):
    fake.commit = "main"
    with pytest.raises(UserError, match="names no commit"):
        sources.resolved("org/name")
    assert not sources.REVISIONS.exists()
    sources.REVISIONS.write_text('{"models": {"org/name": "main"}}')
    with pytest.raises(UserError, match="'main' for org/name, which is no commit"):
        sources.resolved("org/name")
    sources.REVISIONS.write_text("{")
    with pytest.raises(UserError, match="revisions.json is damaged"):
        sources.resolved("org/name")


def test_models_are_loaded_at_their_commit(fake, monkeypatch):
    """From the pair down to what transformers is asked for; the fingerprint of a pair changes with the
    commit.
    """
    from lib.models import pairs

    calls = []
    monkeypatch.setattr(
        pairs.AutoConfig,
        "from_pretrained",
        lambda where, **options: calls.append((where, options)) or "config",
    )
    pair = Pair("mine", {"base": "org/base", "distilled": f"org/distilled@{B}"})
    assert pair.config("base") == pair.config("distilled") == "config"
    assert [(where, options["revision"]) for where, options in calls] == [
        ("org/base", A),
        ("org/distilled", B),
    ]
    assert all(options["trust_remote_code"] is False for _, options in calls)
    before = pair.fingerprint("base")
    sources.REVISIONS.unlink()
    fake.commit = B
    assert pair.fingerprint("base") != before


def test_the_papers_pairs_are_in_the_registry_without_invented_commits():
    for name in ("r1_qwen_1.5b", "r1_qwen_7b", "r1_qwen_14b", "r1_qwen_32b", "r1_llama_8b"):
        pair = load_pair(name)
        assert (
            pair.models["distilled"].startswith("deepseek-ai/DeepSeek-R1-Distill-")
            and pair.dictionary == 32768
        )
        assert all("@" not in source for source in pair.models.values()), (
            "commits are recorded when they are met"
        )
        assert {kind for _, kind in pair.corpus} == {
            "trace",
            "general",
        } and pair.dtype == pair.store_dtype == "bfloat16"
    assert (
        load_pair("r1_qwen_1.5b").models["base"] == "Qwen/Qwen2.5-Math-1.5B"
        and load_pair("r1_qwen_14b").models["base"] == "Qwen/Qwen2.5-14B"
    )


# --- streams ------------------------------------------------------------------------------------------------


def test_a_data_set_is_streamed_at_its_commit(fake, monkeypatch):
    calls = []

    def load_dataset(*args, **options):
        calls.append((args, options))
        return iter([{"text": "one"}, {"text": "two"}])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert [row["text"] for row in sources.dataset_rows("hub:org/texts")] == ["one", "two"]
    assert calls == [(("org/texts",), {"split": "train", "revision": A, "streaming": True})]
    assert json.loads(sources.REVISIONS.read_text()) == {"datasets": {"org/texts": A}}


def test_files_are_read_in_turns_by_their_size(fake, monkeypatch, tmp_path):
    """Real text files, the real library: a file thrice as long gives three quarters of every stretch."""
    (tmp_path / "long.jsonl").write_text(
        "".join(f'{{"text": "l{i:04d}", "meta": {{"a": {i}}}}}\n' for i in range(300))
    )
    (tmp_path / "short.jsonl").write_text(
        "".join(f'{{"text": "s{i:04d}", "meta": {{"b": "{i}"}}}}\n' for i in range(100))
    )
    fake.files = [(name, (tmp_path / name).stat().st_size) for name in ("short.jsonl", "long.jsonl")] + [
        ("README.md", 10)
    ]
    real = datasets.load_dataset

    def load_dataset(builder, data_files, **options):
        assert data_files.startswith(f"hf://datasets/org/texts@{A}/")
        return real(
            builder,
            data_files=str(tmp_path / data_files.rpartition("/")[2]),
            cache_dir=tmp_path / "cache",
            **options,
        )

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    lines = [json.loads(row["text"])["text"] for row in sources.dataset_rows("hub:org/texts:*.jsonl")]
    assert len(lines) == len(set(lines)) == 400  # unlike types in "meta" do not matter: lines are lines
    assert [line for line in lines if line[0] == "l"] == sorted(line for line in lines if line[0] == "l")
    for first in (0, 100, 200):
        assert abs(sum(line[0] == "l" for line in lines[first : first + 100]) - 75) <= 3
    with pytest.raises(UserError, match="has no file \\*.csv: it has"):
        list(sources.dataset_rows("hub:org/texts:*.csv"))


def test_a_stream_is_lazy_and_its_failures_are_one_sentence(fake, monkeypatch):
    def endless():
        yield {"text": "first"}
        raise ConnectionError("the line is dead\nTraceback")

    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: endless())
    stream = sources.dataset_rows("hub:org/texts")
    assert next(stream) == {"text": "first"}
    with pytest.raises(
        UserError,
        match="cannot be asked for the dataset org/texts .the line is dead., and it is read from there",
    ):
        next(stream)


@pytest.mark.parametrize("source", ["hub:", "hub:name", "org/name", "hub:org/name/more", "hub:org/na me"])
def test_what_names_no_data_set(source):
    with pytest.raises(UserError, match="names neither a file nor a data set on the hub"):
        sources.dataset(source)


def test_what_names_a_data_set():
    assert sources.dataset("hub:org/na-me.v1@v1.0:*_sample.jsonl") == (
        "org/na-me.v1@v1.0",
        "*_sample.jsonl",
        None,
        "train",
    )
    for text, config, split in (
        ("", None, "train"),
        ("#a", "a", "train"),
        ("#a/b", "a", "b"),
        ("#/b", None, "b"),
    ):
        assert sources.dataset(f"hub:org/name@v1{text}") == ("org/name@v1", None, config, split)
    with pytest.raises(UserError, match="names neither"):
        sources.dataset("hub:org/name:*.jsonl#a")


def test_configurations_and_splits_are_named_or_listed(fake, monkeypatch, tmp_path):
    """A real data set of two configurations, one without a split "train"; in a folder, for the hub's."""
    monkeypatch.setattr(sources, "resolved", lambda *_: (str(tmp_path), None))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    files = {"small": "small/train.jsonl", "large": "large/test.jsonl"}
    configs = [
        f"- config_name: {c}\n  data_files:\n  - split: {Path(f).stem}\n    path: {f}"
        for c, f in files.items()
    ]
    (tmp_path / "README.md").write_text("---\nconfigs:\n" + "\n".join(configs) + "\n---\n")
    for name, file in files.items():
        (tmp_path / name).mkdir()
        (tmp_path / file).write_text(json.dumps({"text": name}) + "\n")
    read = lambda source: [row["text"] for row in sources.dataset_rows(source)]  # noqa: E731
    assert read("hub:org/name#small") == ["small"] and read("hub:org/name#large/test") == ["large"]
    for source, words in (
        ("hub:org/name", "has the configurations (small, large|large, small): name one, as"),
        ("hub:org/name#middle", "has the configurations"),
        ("hub:org/name#large", "has the splits test, and no train: name one, as .*#large/test"),
    ):
        with pytest.raises(UserError, match=words):
            read(source)
