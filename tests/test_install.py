"""The installed package: what is shipped, and what is said when TFF is missing or unsuitable."""

import email
import importlib.metadata
import os
import pathlib
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile

import pytest

import aggregators._requirements
import tff_optim._requirements

ROOT = pathlib.Path(__file__).parent.parent
CHECKS = [tff_optim._requirements.check_tff, aggregators._requirements.check_tff]


@pytest.mark.parametrize("check", CHECKS)
def test_a_missing_tff_is_an_error_that_names_the_fix(check, monkeypatch):
    def version(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    with pytest.raises(ImportError, match=r"none is installed.*requirements\.lock"):
        check()


@pytest.mark.parametrize("check", CHECKS)
def test_an_unsuitable_tff_is_an_error_that_names_the_fix(check, monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.1.0")
    with pytest.raises(ImportError, match=r"found 0\.1\.0.*requirements\.lock"):
        check()


@pytest.fixture(scope="module")
def distributions(tmp_path_factory):
    """A wheel and an sdist, built from a copy of the project."""
    source = tmp_path_factory.mktemp("source") / "project"
    ignored = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "__pycache__", "output")
    shutil.copytree(ROOT, source, ignore=ignored)
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(source / "dist")]
    run = subprocess.run([*command, str(source)], capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stdout + run.stderr
    return list((source / "dist").iterdir())


@pytest.mark.slow
def test_a_wheel_works_in_an_environment_that_had_nothing_of_ours(distributions, tmp_path):
    """The locked set takes minutes to install, so the environment borrows this one's."""
    (wheel,) = [path for path in distributions if path.suffix == ".whl"]
    venv.create(tmp_path / "env", with_pip=True, symlinks=True)
    python = tmp_path / "env/bin/python"
    (target,) = (tmp_path / "env/lib").glob("python*/site-packages")
    # A folder that a .pth file adds is searched for packages, but not for .pth files: the checkout
    # that is installed there stays out.
    (target / "locked.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    pip = [python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", wheel]
    subprocess.run(pip, check=True, timeout=120)
    (block, *_) = re.findall(
        r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.M | re.S
    )
    code = (
        f"{block}\nimport aggregators, tff_optim\n"
        "tff.test.set_no_default_context()\n"
        "print(tff_optim.__file__, aggregators.__file__)\n"
    )
    run = subprocess.run(
        [python, "-c", code],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=tmp_path,
        env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"},
    )
    assert run.returncode == 0, run.stderr
    assert all(path.startswith(str(target)) for path in run.stdout.split())
    for package in ("tff_optim", "aggregators"):
        assert (target / package / "py.typed").exists()
        shipped = {p.relative_to(target).as_posix() for p in (target / package).rglob("*.py")}
        written = {p.relative_to(ROOT).as_posix() for p in (ROOT / package).rglob("*.py")}
        assert shipped == written


@pytest.mark.slow
def test_an_sdist_holds_what_a_wheel_is_built_from(distributions):
    (sdist,) = [path for path in distributions if path.name.endswith(".tar.gz")]
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    needed = {"setup.cfg", "pyproject.toml", "README.md", "LICENSE", "tff_optim/py.typed"}
    needed |= {"CITATION.cff", "requirements.lock", "docs/pages/guides/gpu.md", "docs/mkdocs.yml"}
    assert needed <= names


@pytest.mark.slow
def test_a_wheel_says_who_what_and_under_which_licence(distributions):
    (wheel,) = [path for path in distributions if path.suffix == ".whl"]
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [n for n in archive.namelist() if n.endswith(".dist-info/METADATA")]
        about = email.message_from_bytes(archive.read(name))
        licences = [n for n in archive.namelist() if n.endswith("/LICENSE")]
    assert licences
    cited = dict(re.findall(r"^(\w+): (.*)$", (ROOT / "CITATION.cff").read_text(), re.M))
    assert (about["License"], about["Version"]) == (cited["license"], cited["version"])
    (author,) = re.findall(r'- name: "(.*)"', (ROOT / "CITATION.cff").read_text())
    assert about["Author"] == author
    assert {"examples", "optax"} <= set(about.get_all("Provides-Extra"))
    text = about.get_payload()
    assert text.startswith("# tff-optim")
    assert re.findall(r"\]\((?!https?:)", text) == []


def test_a_wrong_python_gives_one_clear_line(tmp_path):
    for name in ("Makefile", "requirements.lock", "setup.cfg", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path / name)
    wrong = tmp_path / "python"
    wrong.write_text('#!/bin/sh\n[ "$1" = --version ] && echo "Python 3.9.1" && exit 0\nexit 1\n')
    wrong.chmod(0o755)
    run = subprocess.run(
        ["make", "--silent", "test", f"PYTHON={wrong}"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert run.returncode != 0
    first, *rest = run.stderr.strip().splitlines()
    assert first.startswith("Python 3.11 is needed")
    assert "Python 3.9.1" in first
    assert all(line.startswith("make") for line in rest), rest
    assert not (tmp_path / ".venv").exists()
