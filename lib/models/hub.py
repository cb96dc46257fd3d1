"""The Hugging Face hub: which commit of a repository is meant, and data sets read as a stream.

A name on the hub is not a model but whatever its branch holds today. So the first download asks which commit
that is, writes it down beside the registry, in data/revisions.json, and from then on only this commit is
loaded, on this machine and, once the file is committed, on every other::

    {"models": {"Qwen/Qwen2.5-Math-1.5B": "<commit>"}, "datasets": {"open-thoughts/OpenThoughts-114k": "<commit>"}}

Nobody writes a commit from memory: what is not recorded is asked for, and where it cannot be asked for,
nothing is loaded. A registry may pin a commit itself (``org/name@<commit>``); if another one is recorded,
that is an error, not a choice.

Data sets are streamed: nothing is downloaded but what is read. The library runs no loading scripts; a data
set that has one is read by its files (``hub:org/name:*.jsonl``), in turns, so that every stretch of the
stream is mixed like the whole.
"""

from __future__ import annotations

import fnmatch
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

from ..runs import write_text
from ..settings import ROOT, UserError

REVISIONS = ROOT / "data" / "revisions.json"
SCHEME = "hub:"
_COMMIT = re.compile(r"[0-9a-f]{40}")
_SOURCE = re.compile(r"hub:(?P<repo>[\w.-]+/[\w.-]+(@[\w./-]+?)?)(:(?P<files>[^:]+))?")


# --- commits ------------------------------------------------------------------------------------------------


def resolved(source: str, kind: str = "model", file: Path | None = None) -> tuple[str, str]:
    """(repository, commit) of "org/name", "org/name@tag" or "org/name@commit"; ``kind`` is model or dataset.

    The commit that is recorded in ``file`` (data/revisions.json), or else the one that the hub names now,
    which is then recorded. UserError if the registry pins another commit than the recorded one, if the hub
    does not answer and nothing is recorded, and if there is no such repository, or none for this user.
    """
    file = file or REVISIONS
    repo, _, asked = source.partition("@")
    record = _read(file)
    known = record.setdefault(f"{kind}s", {})
    if _COMMIT.fullmatch(asked):
        if (other := known.get(repo, asked)) != asked:
            raise UserError(
                f"the registry pins {repo} to {asked}, and {file.name} records {other}: change one of them,"
                " results of two commits must not be mixed"
            )
        commit = asked
    else:
        commit = known.get(source) or _ask(repo, asked or None, kind, file)
    if source.removesuffix(f"@{commit}") not in known:
        known[source.removesuffix(f"@{commit}")] = commit
        _write(file, record)
    return repo, commit


def _ask(repo: str, revision: str | None, kind: str, file: Path) -> str:
    api = HfApi()
    try:
        found = (api.model_info if kind == "model" else api.dataset_info)(repo, revision=revision).sha
    except Exception as error:  # the network fails in many ways, each with a class of its own
        raise _sentence(
            error,
            repo,
            kind,
            f"no commit of it is recorded in {file.name}; connect once, or pin one in the registry as "
            f"{repo}@COMMIT",
        ) from None
    if not isinstance(found, str) or not _COMMIT.fullmatch(found):
        raise UserError(f"the hub names no commit for the {kind} {repo}: it answered {found!r}")
    return found


def _sentence(error: Exception, repo: str, kind: str, otherwise: str) -> UserError:
    """What a user can do about an error of the hub, in one sentence."""
    page = f"https://huggingface.co/{'datasets/' if kind == 'dataset' else ''}{repo}"
    if isinstance(error, GatedRepoError):
        return UserError(
            f"the {kind} {repo} is gated: accept its licence at {page} and log in (hf auth login)"
        )
    if isinstance(error, RevisionNotFoundError):
        return UserError(f"the {kind} {repo} has no such revision: see {page}/commits/main")
    if isinstance(error, RepositoryNotFoundError):
        return UserError(
            f"the hub has no {kind} {repo} that you may read: check the name, or log in (hf auth login) if it"
            " is private"
        )
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return UserError(f"the hub cannot be asked for the {kind} {repo} ({reason}), and {otherwise}")


def _read(file: Path) -> dict:
    if not file.is_file():
        return {}
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        entries = [(kind, name, commit) for kind, group in record.items() for name, commit in group.items()]
    except (ValueError, AttributeError):
        raise UserError(
            f'{file.name} is damaged: it must be JSON of the form {{"models": {{"org/name": "commit"}}}}'
        ) from None
    for kind, name, commit in entries:
        if kind not in ("models", "datasets") or not isinstance(commit, str) or not _COMMIT.fullmatch(commit):
            raise UserError(
                f"{file.name} records {commit!r} for {name}, which is no commit (40 hexadecimal digits):"
                " remove the entry"
            )
    return record


def _write(file: Path, record: Mapping) -> None:
    kept = {kind: dict(sorted(group.items())) for kind, group in sorted(record.items()) if group}
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_text(file, json.dumps(kept, indent=1) + "\n")
    except OSError as error:
        raise UserError(
            f"{file.name} cannot be written ({error.strerror}): a commit that is not recorded could be"
            " another one tomorrow; make it writable, or pin commits in the registry and record them there"
            " yourself"
        ) from None


# --- data sets ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Dataset:
    """A data set on the hub: its repository (with a revision, if one is wanted) and, if it is read by files,
    their pattern.
    """

    repo: str
    files: str | None = None

    @property
    def commit(self) -> str:
        return resolved(self.repo, "dataset")[1]


def dataset(source: str) -> Dataset:
    """The data set that "hub:org/name", "hub:org/name@revision" or "hub:org/name:*.jsonl" names. UserError
    for another form.
    """
    if not (match := _SOURCE.fullmatch(source)):
        raise UserError(
            f"{source!r} names neither a file nor a data set on the hub: write org/name, or org/name@commit"
        )
    return Dataset(match["repo"], match["files"])


def rows(source: str) -> Iterator[dict]:
    """The rows of a data set's split "train", one after the other, as they arrive; of text files the lines,
    as {"text": line}.

    The order is that of the data set, the same every time. Files are taken in turns, each as often as its
    size demands: the next row comes from the one of which the smallest share has been read. UserError, in one
    sentence, if the hub fails.
    """
    import datasets  # a second; most runs need none

    wanted = dataset(source)
    repo, commit = resolved(wanted.repo, "dataset")
    try:
        if wanted.files is None:
            yield from datasets.load_dataset(repo, split="train", revision=commit, streaming=True)
        else:
            streams, read = {}, {}
            for name, size in _files(repo, commit, wanted.files).items():
                builder = "parquet" if name.endswith(".parquet") else "text"
                streams[name] = (
                    iter(
                        datasets.load_dataset(
                            builder,
                            data_files=f"hf://datasets/{repo}@{commit}/{name}",
                            split="train",
                            streaming=True,
                        )
                    ),
                    max(size, 1),
                )
                read[name] = 0.0
            while streams:
                name = min(read, key=read.get)
                stream, size = streams[name]
                if (row := next(stream, None)) is None:
                    del streams[name], read[name]
                    continue
                read[name] += len(str(row)) / size
                yield row
    except (UserError, GeneratorExit):
        raise
    except Exception as error:
        raise _sentence(
            error, repo, "dataset", "it is read from there as it is needed: connect, or give a file instead"
        ) from None


def _files(repo: str, commit: str, pattern: str) -> dict[str, int]:
    """{name: bytes} of the files of a data set whose names match the pattern, sorted by name."""
    siblings = HfApi().dataset_info(repo, revision=commit, files_metadata=True).siblings or []
    found = {
        s.rfilename: s.size or 1
        for s in sorted(siblings, key=lambda s: s.rfilename)
        if fnmatch.fnmatch(s.rfilename, pattern)
    }
    if not found:
        raise UserError(
            f"the data set {repo} has no file {pattern}: it has"
            f" {', '.join(s.rfilename for s in siblings[:10])}"
        )
    return found
