"""One environment, described three times: requirements.txt, constraints.txt and environment.yml agree."""

import ast
import os
import re
import subprocess
import sys
from importlib import metadata

import yaml
from packaging.requirements import Requirement

from lib.settings import ROOT


def pins(text):
    return dict(
        line.split("==") for line in re.findall(r"^\s*(?:- )?([A-Za-z0-9_.-]+==[^\s#]+)", text, re.MULTILINE)
    )


def normal(name):
    return re.sub(r"[-_.]+", "-", name).lower()


REQUIRED = pins((ROOT / "requirements.txt").read_text())


def test_every_requirement_is_pinned():
    lines = [
        line
        for line in (ROOT / "requirements.txt").read_text().splitlines()
        if line.strip() and not line.startswith("#")
    ]
    assert len(lines) == len(REQUIRED) and REQUIRED["torch"] == "2.13.0"


def test_environment_yml_equals_requirements():
    text = (ROOT / "environment.yml").read_text()
    content = yaml.safe_load(text)
    assert content["channels"] == ["conda-forge"] and "python=3.11" in content["dependencies"]
    (by_pip,) = [entry["pip"] for entry in content["dependencies"] if isinstance(entry, dict)]
    assert "-c constraints.txt" in by_pip
    assert pins("\n".join(by_pip)) == REQUIRED
    lines = [line for line in text.splitlines() if "==" in line]
    assert all(re.search(r"#\s*\w", line) for line in lines), "every dependency says why it is there"


def test_constraints_hold_every_requirement_and_no_local_versions():
    held = {normal(name): version for name, version in pins((ROOT / "constraints.txt").read_text()).items()}
    assert {normal(name): version for name, version in REQUIRED.items()}.items() <= held.items()
    assert not any("+" in version for version in held.values())


def test_installed_versions_are_the_pinned_ones():
    for name, version in REQUIRED.items():
        assert metadata.version(name).partition("+")[0] == version, name


def test_constraints_pin_whatever_the_requirements_bring_in():
    """Every distribution that is needed in the end, as it is installed here."""
    held = {normal(name): version for name, version in pins((ROOT / "constraints.txt").read_text()).items()}
    todo, seen = list(REQUIRED), set()
    while todo:
        name = normal(todo.pop())
        if name in seen:
            continue
        seen.add(name)
        assert name in held, f"{name} is needed, and constraints.txt does not say in which version"
        assert metadata.version(name).partition("+")[0] == held[name], name
        for line in metadata.requires(name) or ():
            needed = Requirement(line)
            if needed.marker is None or needed.marker.evaluate({"extra": ""}):
                todo.append(needed.name)
    assert len(seen) > 100


def test_whatever_lib_imports_is_required():
    aliases = {
        "sklearn": "scikit-learn",
        "umap": "umap-learn",
        "yaml": "pyyaml",
        "IPython": "ipykernel",
        "choreographer": "kaleido",
        "triton": "torch",  # comes with its builds for CUDA, which alone use it
    }
    for file in (ROOT / "lib").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            modules = []
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and not node.level:
                modules = [node.module]
            for module in (m.partition(".")[0] for m in modules):
                assert module in sys.stdlib_module_names or aliases.get(module, module) in REQUIRED, (
                    f"{file.name} imports {module}"
                )


def make(*words):
    # not a sub-make: `make test ARGS=...` exports what stood on its line
    alone = {"PATH": os.environ["PATH"]}
    return subprocess.run(
        ["make", "-n", *words], cwd=ROOT, env=alone, capture_output=True, text=True, check=True
    ).stdout


def test_make_passes_its_variables_on():
    line = make("figures", "PAIR=mine", "PROFILE=smoke", "ONLY=03 04").splitlines()[-1].strip()
    assert line.endswith('-m lib figures --pair "mine" --profile "smoke" --only 03 04')
    assert "make figures" in make("help") and "make figures" in make()  # the default target only helps
    assert 'rm -rf "data/runs/tiny"' in make("clean-runs")


def test_an_old_python_is_refused_with_a_sentence(tmp_path):
    old = tmp_path / "python3"
    old.write_text('#!/bin/sh\n[ "$1" = --version ] && echo "Python 3.8.1" && exit\nexit 1\n')
    old.chmod(0o755)
    for name in ("Makefile", "requirements.txt", "constraints.txt"):
        (tmp_path / name).write_text((ROOT / name).read_text())
    done = subprocess.run(["make", "test", f"PYTHON={old}"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode != 0 and "Python 3.11 or newer is needed" in done.stderr and "3.8.1" in done.stderr
    assert not (tmp_path / ".venv").exists()


def test_no_machine_is_written_into_the_project():
    """No absolute path of a home or a workspace, and no package index, in what is committed as text."""
    wrong = re.compile(r"(/home/\w+|/Users/\w+|/root/|/work/|index-url|pypi\.)")
    files = [
        p
        for part in ("lib", "tests", ".github", ".ci")
        for p in (ROOT / part).rglob("*")
        if p.suffix in (".py", ".yml", "")
    ]
    files += [
        ROOT / name
        for name in ("Makefile", "environment.yml", "requirements.txt", "constraints.txt", "pyproject.toml")
    ]
    files += [p for p in (ROOT / "notebooks" / "profiles").glob("*.yaml")]
    for file in files:
        if file.is_file() and file.name != "test_environment.py" and file.name != "test_notebooks.py":
            assert not wrong.search(file.read_text()), (
                f"{file.relative_to(ROOT)}: {wrong.search(file.read_text())[0]}"
            )
