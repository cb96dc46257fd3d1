"""The driver: what it refuses before anything runs, what it leaves behind when a notebook fails, and the
canonical form.
"""

import json
import os
import re

import nbformat
import pytest
from nbclient import NotebookClient
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from lib.models.pairs import load_pair
from lib.settings import UserError
from lib.tools import notebooks as driver
from lib.tools import profiles
from lib.tools.cli import main

PARAMETERS = (
    'pair = "tiny"  # entry of data/pairs.yaml\nrun = "default"\nseed = 0\nrate = 1e-3\nks = [1, 2]\nfast ='
    " True\nfeature = None"
)


def write(folder, stem, *cells):
    parameters = new_code_cell(PARAMETERS, metadata={"tags": ["parameters"]})
    nb = new_notebook(cells=[new_markdown_cell("# ?"), parameters, *map(new_code_cell, cells)])
    # the driver has its own
    nb.metadata["kernelspec"] = {"name": "no-such-kernel", "display_name": "x", "language": "python"}
    nbformat.write(nb, folder / f"{stem}.ipynb")


@pytest.fixture
def house(tmp_path):
    """A small repository: two notebooks that work, two profiles, two pairs."""
    notebooks = tmp_path / "notebooks"
    (notebooks / "profiles").mkdir(parents=True)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "pairs.yaml").write_text("tiny: {base: a/b, distilled: a/c}\nother: {like: tiny}\n")
    (notebooks / "profiles" / "default.yaml").write_text("timeout: 60\n")
    (notebooks / "profiles" / "smoke.yaml").write_text("timeout: 60\n00_first: {seed: 5, rate: 1e-2}\n")
    write(notebooks, "00_first", "import sys\nprint(pair, run, seed, rate)\nprint('noise', file=sys.stderr)")
    write(notebooks, "01_second", "print(feature)")
    return notebooks


def call(house, *words):
    return main(["figures", "--notebooks", str(house), *words])


def text_of(notebook):
    return "".join(o.get("text", "") for c in nbformat.read(notebook, 4).cells for o in c.get("outputs", ()))


@pytest.mark.parametrize(
    "words, sentence",
    [
        (["--pair", "tinny"], "unknown pair 'tinny': pairs.yaml has tiny, other"),
        (["--profile", "big"], "unknown profile 'big': there are default, smoke"),
        (["--only", "07"], "unknown notebook '07': there are 00_first, 01_second"),
        (
            ["--only", "01", "-p", "fetaure", "3"],
            "01_second has no parameter 'fetaure': it has fast, feature,",
        ),
        (
            ["--only", "01", "-p", "seed", "1.5"],
            "seed of 01_second is 1.5: it must be of type int, like its default 0",
        ),
        (["--only", "01", "-p", "seed", "True"], "seed of 01_second is True: it must be of type int"),
        (["--only", "01", "-p", "rate", "fast"], "rate of 01_second is 'fast': it must be of type float"),
        (["--only", "01", "-p", "fast", "1"], "fast of 01_second is 1: it must be of type bool"),
        (["--only", "01", "-p", "ks", "3"], "ks of 01_second is 3: it must be of type list"),
        (
            ["--only", "01", "-p", "ks", "['a']"],
            "ks of 01_second is ['a']: it must be of type list, like its default [1, 2]",
        ),
        (["-p", "seed", "1"], "-p sets a parameter of one notebook, and 2 are chosen"),
        (["--registry", "nowhere.yaml"], "registry of pairs nowhere.yaml does not exist"),
    ],
)
def test_wrong_usage_is_one_sentence_before_anything_runs(house, capsys, words, sentence):
    before = {p: p.read_bytes() for p in house.rglob("*.*")}
    assert call(house, *words) == 2
    out, err = capsys.readouterr()
    assert sentence in err and len(err.splitlines()) == 1 and out == ""
    assert {p: p.read_bytes() for p in house.rglob("*.*")} == before
    assert not (house.parent / "data" / "runs").exists()


def test_a_profile_of_a_pair_is_laid_over_the_profile(house):
    (house / "profiles" / "default.yaml").write_text("timeout: 60\n00_first: {seed: 5, rate: 0.1}\n")
    (house / "profiles" / "default.other.yaml").write_text(
        "timeout: 90\n00_first: {seed: 7}\n01_second: {ks: [3]}\n"
    )
    read = lambda pair: profiles.read_profile(house / "profiles", "default", ["00_first", "01_second"], pair)  # noqa: E731
    assert read("tiny") == {"timeout": 60, "00_first": {"seed": 5, "rate": 0.1}}
    assert read("other") == {"timeout": 90, "00_first": {"seed": 7, "rate": 0.1}, "01_second": {"ks": [3]}}
    (house / "profiles" / "default.other.yaml").write_text("09_none: {}\n")
    with pytest.raises(UserError, match="profile 'default.other' names 09_none"):
        read("other")


def test_what_a_pair_says_of_budgets_goes_before_notebooks_and_behind_profiles(house):
    (house.parent / "data" / "pairs.yaml").write_text(
        "tiny: {base: a/b, distilled: a/c, tokens: 77}\nother: {like: tiny, dictionary: 78}\n"
    )
    for stem, name in (("01_second", "tokens"), ("02_third", "n_features")):
        write(house, stem, "")
        notebook = nbformat.read(house / f"{stem}.ipynb", 4)
        notebook.cells[1].source += f"\n{name} = 5"
        nbformat.write(notebook, house / f"{stem}.ipynb")
    (house / "profiles" / "smoke.yaml").write_text("01_second: {tokens: 9}\n")
    values = lambda stem, *rest: driver.parameters_for(stem, "other", *rest, folder=house)  # noqa: E731
    assert values("01_second")["tokens"] == 77 and values("02_third")["n_features"] == 78
    assert values("01_second", "smoke")["tokens"] == 9
    assert values("01_second", "smoke", [("tokens", "3")])["tokens"] == 3


def test_a_walk_with_another_pair_leaves_out_what_is_about_the_embedded_one(house, capsys):
    assert call(house, "--pair", "other") == 0
    assert "1 notebook in" in capsys.readouterr().out
    assert "other default" not in text_of(house / "00_first.ipynb")
    assert call(house, "--pair", "other", "--only", "00") == 0  # whoever names it gets it


def test_notebooks_load_pairs_from_a_registry_of_ones_own(house, tmp_path, monkeypatch):
    (tmp_path / "own.yaml").write_text(
        "tiny: {base: a/b, distilled: a/c, dictionary: 77}\nmine: {like: tiny, dictionary: 78}\n"
    )
    write(house, "01_second", "import os\nprint(pair, os.environ['PAIRS_REGISTRY'])")
    monkeypatch.chdir(tmp_path)  # not where the notebooks run
    before = (house / "01_second.ipynb").read_bytes()

    def dictionary_of(pair):
        """The pair as a notebook loads it: in its folder, with what it has in its environment."""
        executed = tmp_path / "data" / "runs" / pair / "default" / "notebooks" / "01_second.ipynb"
        name, registry = text_of(executed).split()
        with monkeypatch.context() as there:
            there.chdir(house)  # not where the registry is
            there.setenv("PAIRS_REGISTRY", registry)
            return load_pair(name).dictionary

    assert call(house, "--pair", "mine", "--registry", "own.yaml", "--only", "01") == 0
    assert dictionary_of("mine") == 78
    assert "PAIRS_REGISTRY" not in os.environ
    monkeypatch.setenv("PAIRS_REGISTRY", "own.yaml")
    # this tiny is not the embedded pair: the canonical notebook is left alone
    assert call(house, "--only", "01") == 0
    assert dictionary_of("tiny") == 77
    assert (house / "01_second.ipynb").read_bytes() == before
    assert call(house, "--pair", "other", "--only", "01") == 2


def test_a_profile_with_a_wrong_value_or_notebook_stops_before_the_first_notebook(house, capsys):
    for content, sentence in (
        ("01_second: {seed: x}", "seed of 01_second is 'x'"),
        ("09_none: {}", "names 09_none"),
        ("timeout: 2h", "timeout of profile 'smoke' (seconds of a cell) is '2h': it must be an integer"),
        ("timeout: 0.5", "(seconds of a cell) is 0.5"),
        ("workers: two", "workers of profile 'smoke' (notebooks at once) is 'two'"),
        ("00_first: {}\n00_first: {}", "'00_first' stands there twice"),
        ("7: {}", "has the name 7, which is no text"),
        ("- a", "must hold name: value"),
        ("a: [", "not valid YAML"),
    ):
        (house / "profiles" / "smoke.yaml").write_text(content)
        assert call(house, "--profile", "smoke") == 2
        assert sentence in capsys.readouterr().err


def test_values_keep_their_types():
    defaults = dict(rate=1e-3, seed=0, name="a", ks=[1], gains=[1.0], any=None)
    given = dict(rate="1e-2", seed=3, name="b", ks=[], gains=[2, 0.5], any=[1])
    assert profiles.checked("nb", defaults, given) == dict(given, rate=0.01)
    assert type(profiles.checked("nb", defaults, dict(rate=2))["rate"]) is float
    assert profiles.read_value("12", "text") == "12" and profiles.read_value("12", None) == 12
    assert profiles.read_value("true", False) is True and profiles.read_value("[1, 2]", [0]) == [1, 2]


def test_parameters_must_be_literals(tmp_path):
    for source in ("x = 1 + len('a')", "import os", "a, b = 1, 2", "x += 1"):
        nb = new_notebook(cells=[new_code_cell(source, metadata={"tags": ["parameters"]})])
        nbformat.write(nb, tmp_path / "00_x.ipynb")
        with pytest.raises(UserError, match="name = literal"):
            driver.parameters_of(tmp_path / "00_x.ipynb")


def test_default_run_is_written_in_place_and_twice_the_same(house, capsys):
    assert call(house) == 0
    out, err = capsys.readouterr()
    lines = [re.sub(r" \d+ s.*", "", line) for line in out.splitlines()[:5]]
    assert lines == ["00_first ...", "00_first", "01_second ...", "01_second", "2 notebooks in"]
    assert text_of(house / "00_first.ipynb") == "tiny default 0 0.001\n"  # standard error is dropped
    first = (house / "00_first.ipynb").read_bytes()
    assert call(house, "--only", "0") == 0
    assert (house / "00_first.ipynb").read_bytes() == first
    nb = nbformat.read(house / "00_first.ipynb", 4)
    assert [c.id for c in nb.cells] == ["c00", "c01", "c02"] and [
        c.get("execution_count") for c in nb.cells
    ] == [None, 1, 2]
    kernel = {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"}
    assert nb.metadata == {"kernelspec": kernel, "language_info": {"name": "python"}}
    assert not list((house.parent / "data").rglob("*.ipynb"))


WAIT = (  # until a file is there
    "import time\nfrom pathlib import Path\nfor _ in range(600):\n"
    "    if not Path({name!r}).is_file():\n        time.sleep(0.1)\n"
)


def test_notebooks_that_do_not_need_each_other_run_at_once(house, monkeypatch, capsys):
    (house.parent / "data" / "pairs" / "tiny").mkdir(parents=True)  # an embedded pair
    monkeypatch.setattr(driver, "_cores", lambda: 2)
    monkeypatch.setattr(driver, "_memory", lambda: 8 << 30)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "chdir", lambda folder: None)  # one folder for all threads: nobody changes it
    write(house, "00_first", WAIT.format(name="01") + "import os\nprint(os.environ['OMP_NUM_THREADS'])")
    write(house, "01_second", "from pathlib import Path\n_ = Path('01').write_text('')")
    write(house, "02_third", "from pathlib import Path\nprint(Path('01').exists())")
    write(house, "06_last", "from pathlib import Path\nprint('OMP' in Path('00_first.ipynb').read_text())")
    assert call(house) == 0
    assert text_of(house / "00_first.ipynb") == "1\n"  # of two cores one each
    assert text_of(house / "02_third.ipynb") == "True\n" and text_of(house / "06_last.ipynb") == "True\n"
    out = capsys.readouterr().out.splitlines()
    assert out[:2] == ["00_first ...", "01_second ..."] and out[-1].startswith("4 notebooks")
    assert "OMP_NUM_THREADS" not in os.environ
    # one that fails: what runs goes on to its end, nothing else begins
    (house / "01").unlink()
    write(house, "00_first", WAIT.format(name="01") + "print('done')")
    write(house, "01_second", "from pathlib import Path\n_ = Path('01').write_text('')\n1 / 0")
    write(house, "02_third", "print('never reached')")
    assert call(house) == 1
    assert "error: 01_second: ZeroDivisionError" in capsys.readouterr().err
    assert text_of(house / "00_first.ipynb") == "done\n" and not text_of(house / "02_third.ipynb")
    # one after another, if the profile says so
    (house / "profiles" / "default.yaml").write_text("timeout: 60\nworkers: 1\n")
    write(house, "01_second", "print('done')")
    assert call(house, "--only", "0", "1") == 0
    order = [line.split()[0] for line in capsys.readouterr().out.splitlines()[:4]]
    assert order == ["00_first", "00_first", "01_second", "01_second"]


def test_one_after_another_where_the_machine_or_the_pair_is_not_for_two(tmp_path, monkeypatch):
    for cores, gigabytes, folder, workers in (
        (2, 8, True, 2),
        (1, 8, True, 1),
        (2, 3, True, 1),
        (2, 8, False, 1),
    ):
        monkeypatch.setattr(driver, "_cores", lambda cores=cores: cores)
        monkeypatch.setattr(driver, "_memory", lambda gigabytes=gigabytes: gigabytes << 30)
        assert driver._workers(tmp_path if folder else tmp_path / "none") == workers


def test_memory_is_read_from_this_machine():
    assert 1 << 28 < driver._memory() < 1 << 50


def test_what_a_notebook_needs():
    stems = ["00_a", "01_b", "02_c", "05_f", "06_g", "10_h", "11_i"]
    needed = {stem[:2]: {s[:2] for s in driver._needed(stem, stems)} for stem in stems}
    assert needed["01"] == set() and needed["02"] == needed["05"] == {"01"}
    assert needed["06"] == {"00", "01", "02", "05"} and needed["11"] == {s[:2] for s in stems[:-1]}


def test_another_profile_or_value_leaves_the_canonical_notebook_alone(house):
    before = (house / "00_first.ipynb").read_bytes()
    assert call(house, "--profile", "smoke", "--only", "00") == 0
    executed = house.parent / "data" / "runs" / "tiny" / "smoke" / "notebooks" / "00_first.ipynb"
    assert text_of(executed) == "tiny smoke 5 0.01\n"
    # it says what it ran with
    assert any(driver.INJECTED in c.metadata.get("tags", []) for c in nbformat.read(executed, 4).cells)
    assert call(house, "--only", "00", "-p", "seed", "3") == 0
    assert (
        text_of(house.parent / "data" / "runs" / "tiny" / "default" / "notebooks" / "00_first.ipynb")
        == "tiny default 3 0.001\n"
    )
    assert (house / "00_first.ipynb").read_bytes() == before


def test_a_broken_notebook_fails_cleanly_and_loses_nothing(house, capsys):
    cause = "raise UserError('store is missing: run notebook 01 first')"
    write(house, "01_second", f"class UserError(Exception): pass\nprint('so far')\n{cause}")
    before = (house / "01_second.ipynb").read_bytes()
    write(house, "02_third", "print('never reached')")
    assert call(house) == 1
    out, err = capsys.readouterr()
    assert err == "error: 01_second: store is missing: run notebook 01 first\n"
    assert (house / "01_second.ipynb").read_bytes() == before
    # done stays done; the rest did not run
    assert text_of(house / "00_first.ipynb") and not text_of(house / "02_third.ipynb")
    failed = house.parent / "data" / "runs" / "tiny" / "default" / "notebooks" / "01_second.failed.ipynb"
    assert "so far" in text_of(failed)
    write(house, "01_second", "print('mended')")
    assert call(house, "--only", "01_second") == 0 and not failed.exists()


def test_other_errors_are_named_and_a_stalled_cell_ends(house, capsys):
    write(house, "00_first", "1 / 0")
    assert call(house, "--only", "00") == 1
    assert "00_first: ZeroDivisionError: division by zero" in capsys.readouterr().err
    write(house, "00_first", "import time\ntime.sleep(60)")
    assert call(house, "--only", "00", "--timeout", "1") == 1
    assert "a cell took more than 1 s" in capsys.readouterr().err
    write(house, "00_first", "import os\nos._exit(1)")
    assert call(house, "--only", "00") == 1
    assert "the kernel died" in capsys.readouterr().err


def test_a_notebook_that_is_edited_while_it_runs_is_not_overwritten(house, capsys):
    edit = "_ = p.write_text(p.read_text().replace('# ?', '# edited'))"
    write(house, "00_first", f"from pathlib import Path\np = Path('00_first.ipynb')\n{edit}")
    assert call(house, "--only", "00") == 1
    assert "was edited while it ran" in capsys.readouterr().err
    assert "# edited" in (house / "00_first.ipynb").read_text()


def test_the_terminal_sees_the_progress_of_a_notebook(house, capfd):
    code = "Progress._shown = -99\nwith Progress('rows', 9) as p:\n    p.update(5)"
    path = f"import sys\nsys.path.insert(0, {str(driver.ROOT)!r})\nfrom lib.runs import Progress"
    write(house, "00_first", f"{path}\n{code}")
    assert call(house, "--only", "00") == 0
    assert "  rows: 5/9\n" in capfd.readouterr().err and "rows" not in text_of(house / "00_first.ipynb")


def test_a_profile_may_be_a_file_of_ones_own(house, tmp_path, capsys):
    write(house, "00_first", "print(run, seed)")
    (tmp_path / "wide.yaml").write_text("00_first: {seed: 77}\n")
    assert call(house, "--only", "00", "--profile", str(tmp_path / "wide.yaml")) == 0
    made = house.parent / "data" / "runs" / "tiny" / "wide" / "notebooks" / "00_first.ipynb"
    assert "wide 77" in text_of(made)


def test_the_kernel_is_this_interpreter_and_the_environment_is_restored():
    before = dict(os.environ)
    with driver.own_kernel():
        from jupyter_client.kernelspec import KernelSpecManager

        assert KernelSpecManager().get_kernel_spec("python3").argv[0] == driver.sys.executable
    assert dict(os.environ) == before


def messy():
    """A notebook with everything that an executed one may carry."""
    table = '<style>#T_a1b2c_row0 {}</style><table id="T_a1b2c"></table>'
    figure = {
        "application/vnd.plotly.v1+json": {"data": []},
        "image/png": "iVBORw0KGgo=\n",
        "text/plain": 'Figure "x"',
    }
    outputs = [
        new_output("stream", name="stdout", text="one "),
        new_output("stream", name="stderr", text="warning"),
        new_output("stream", name="stdout", text=f"two <x at 0x7f0012ab34cd> {driver.ROOT}/data\n"),
        new_output("display_data", figure, metadata={"a": 1}),
        new_output(
            "display_data",
            {
                "application/vnd.jupyter.widget-view+json": {"model_id": "1f"},
                "text/plain": "IntSlider(value=1)",
            },
        ),
        new_output("execute_result", {"text/html": table, "text/plain": "<Styler>"}, execution_count=9),
    ]
    metadata = {"papermill": {"duration": 1.5}, "tags": ["parameters"], "execution": {"iopub": "t"}}
    cells = [
        new_code_cell("x", outputs=outputs, execution_count=9, metadata=metadata),
        new_code_cell("seed = 3", metadata={"tags": [driver.INJECTED]}),
        new_markdown_cell("text", metadata={"papermill": {}}),
    ]
    kernel = {"name": "mine", "display_name": "m"}
    return new_notebook(
        cells=cells,
        metadata={"papermill": {"start_time": "now"}, "widgets": {"state": {}}, "kernelspec": kernel},
    )


def test_canonical_form_drops_what_varies_and_keeps_what_is_read():
    nb = driver.canonical(messy())
    text = nbformat.writes(nb)
    for gone in (
        "plotly",
        "widget",
        "papermill",
        "duration",
        "warning",
        "0x7f0012ab34cd",
        str(driver.ROOT),
        "T_a1b2c",
        "mine",
        "seed = 3",
        "iopub",
    ):
        assert gone not in text, gone
    first = nb.cells[0]
    assert (
        first.metadata == {"tags": ["parameters"]}
        and first.execution_count == 1
        and first.outputs[-1].execution_count == 1
    )
    assert [o.output_type for o in first.outputs] == ["stream", "display_data", "execute_result"]
    assert first.outputs[0].text == "one two <x at 0x0> data\n"
    assert set(first.outputs[1].data) == {"image/png", "text/plain"}
    assert 'id="T_00000"' in first.outputs[2].data["text/html"]
    nbformat.validate(nb)
    assert len(driver.canonical(messy(), keep_parameters=True).cells) == 3


def test_canonical_form_of_the_canonical_form_is_itself(tmp_path):
    once = driver.canonical(messy())
    assert nbformat.writes(driver.canonical(once)) == nbformat.writes(once)
    file = tmp_path / "a.ipynb"
    nbformat.write(messy(), file)
    assert driver.canonicalise([file]) == [file] and driver.canonicalise([file]) == []
    json.loads(file.read_text())


def test_an_error_keeps_its_standard_error():
    outputs = [
        new_output("stream", name="stderr", text="cause"),
        new_output("error", ename="E", evalue="", traceback=[]),
    ]
    cell = new_code_cell("x", execution_count=1, outputs=outputs)
    assert driver.canonical(new_notebook(cells=[cell])).cells[0].outputs[0].text == "cause"


def test_canonical_of_something_else_is_refused(tmp_path, capsys):
    (tmp_path / "x.ipynb").write_text("not a notebook")
    assert main(["canonical", str(tmp_path / "x.ipynb")]) == 2
    assert "is not a notebook that can be read" in capsys.readouterr().err


def test_progress_in_a_kernel_is_one_line_that_the_canonical_form_has_not():
    cells = [
        f"import sys\nsys.path.insert(0, {str(driver.ROOT)!r})\nfrom lib.runs import Progress, passing",
        (
            "p = Progress('rows', 3)\nfor i in range(4):\n    p.update(i, note='fast')\np.close()\npassing('4"
            " rows a second')\n'a result'"
        ),
    ]
    nb = new_notebook(cells=[new_code_cell(c) for c in cells])
    with driver.own_kernel():
        NotebookClient(nb, kernel_name="python3", timeout=60).execute()
    shown = [o.data["text/plain"] for o in nb.cells[-1].outputs]
    assert shown == ["rows: 3/3 done", "4 rows a second", "'a result'"]
    assert [o.data["text/plain"] for o in driver.canonical(nb).cells[-1].outputs] == ["'a result'"]
