"""One command line: what it lists, how it reads words, what it loads, and its exit codes."""

import json
import subprocess
import sys

import pytest
import typer

from lib.settings import ROOT, UserError
from lib.tools import cli, notebooks
from lib.tools.notebooks import NotebookFailed

COMMANDS = sorted(typer.main.get_command(cli.app).commands)


def test_help_names_every_command_in_one_line(capsys):
    assert cli.main(["--help"]) == 0
    lines = capsys.readouterr().out.split("Commands:\n")[1].splitlines()
    assert len(lines) == len(COMMANDS) > 10
    for line in lines:
        name, words = line.split(maxsplit=1)
        assert name in COMMANDS and words.endswith(".") and not words.endswith(".."), line


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_for_every_option(command, capsys):
    assert cli.main([command, "--help"]) == 0
    assert "Usage: python -m lib " + command in capsys.readouterr().out
    parameters = [p for p in typer.main.get_command(cli.app).commands[command].params if not p.hidden]
    assert all(p.help for p in parameters), [p.name for p in parameters if not p.help]


def test_nothing_but_help_is_told_without_a_command(capsys):
    assert cli.main([]) == 2
    assert capsys.readouterr().err.startswith("Usage: python -m lib")


def test_help_loads_neither_models_nor_notebooks():
    script = """
import json, sys
from lib.tools.cli import main
main(["--help"])
print(json.dumps(sorted(sys.modules)))"""
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    )
    loaded = set(json.loads(done.stdout.splitlines()[-1]))
    assert not loaded & {"torch", "transformers", "nbformat", "papermill", "plotly", "pandas", "sklearn"}


def test_lists_and_parameters_are_read_as_they_are_written():
    words = ["figures", "--only", "03", "04", "-p", "layer", "-1", "--pair", "x", "--only", "--solutions"]
    assert cli._spelled_out(words) == [
        *["figures", "--only", "03", "--only", "04", "-p", "layer=-1", "--pair", "x", "--solutions"]
    ]
    assert cli._texts(["a=b=c", "d="]) == [("a", "b=c"), ("d", "")]
    with pytest.raises(UserError, match="-p needs a name and a value"):
        cli._spelled_out(["figures", "-p", "layer"])


def test_what_the_driver_is_told(monkeypatch):
    given = []
    monkeypatch.setattr(notebooks, "run_all", lambda *arguments: given.append(arguments))
    words = ["--pair", "mine", "--profile", "smoke", "--only", "03", "4", "--solutions", "--timeout", "5"]
    words += ["--workers", "3"]
    assert cli.main(["figures", *words]) == 0
    row, pair, profile, only, texts, solutions, out, timeout, workers, _ = given[0]
    assert (row, pair, profile, only, texts) == (notebooks.WALK, "mine", "smoke", ["03", "4"], [])
    assert (solutions, out, timeout, workers) == (True, None, 5, 3)


@pytest.mark.parametrize(
    "error, code, sentence",
    [
        (UserError("k is 0: it must be at least 1"), 2, "error: k is 0: it must be at least 1\n"),
        (NotebookFailed("03_x: no store"), 1, "error: 03_x: no store\n"),
        (KeyboardInterrupt(), 130, "interrupted: what is finished is kept"),
    ],
)
def test_errors_have_exit_codes_and_a_sentence(error, code, sentence, monkeypatch, capsys):
    def fails(*_):
        raise error

    monkeypatch.setattr(notebooks, "run_all", fails)
    assert cli.main(["figures"]) == code
    assert sentence in capsys.readouterr().err


def test_fields_of_a_training_are_options_of_their_own_type():
    config = cli._config(["--n-features", "32768", "--k=50", "--rate", "1e-3", "--variant", "topk"])
    assert (config.n_features, config.k, config.rate, config.variant) == (32768, 50, 0.001, "topk")
    for words, sentence in (
        (["--k", "2.5"], "k of TrainConfig is 2.5: it must be of type int"),
        (["--k"], "'--k' is not understood"),
        (["k", "3"], "'k 3' is not understood"),
    ):
        with pytest.raises(UserError, match=sentence):
            cli._config(words)
