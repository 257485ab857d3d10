"""The lists of libraries agree, and the wheel holds what a plain install needs: data/, notebooks/, a shell, a lab."""

import ast
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import tomllib
import urllib.request
import zipfile
from pathlib import Path

import pytest
import yaml

import llmlab

TOP = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((TOP / "pyproject.toml").read_text())["project"]
CONDA_NAMES = {"torch": "pytorch"}  # where conda-forge calls a package otherwise
LARGE = 1_000_000


def plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def split(requirement: str) -> tuple[str, frozenset[str]]:
    """"torch>=2.6,<2.14; marker" -> ("torch", {">=2.6", "<2.14"})."""
    name, bounds = re.fullmatch(r"([\w.-]+)\s*([^;]*?)\s*(?:;.*)?", requirement).groups()
    return plain(name), frozenset(b.strip() for b in bounds.split(",") if b.strip())


def differences(project: dict, environment: dict) -> list[str]:
    """What one list says and the other does not, as text."""
    wanted = {CONDA_NAMES.get(name, name): bounds for name, bounds in map(split, project["dependencies"])}
    wanted["python"] = split("python" + project["requires-python"])[1]
    listed = dict(split(item) for item in environment["dependencies"] if isinstance(item, str))
    listed.pop("pip", None)
    return [f"{name}: pyproject.toml {wanted.get(name)}, environment.yml {listed.get(name)}"
            for name in sorted(wanted.keys() | listed.keys()) if wanted.get(name) != listed.get(name)]


def test_pip_and_conda_get_the_same_libraries_within_the_same_bounds():
    environment = yaml.safe_load((TOP / "environment.yml").read_text())
    assert differences(PROJECT, environment) == []
    assert environment["channels"] == ["conda-forge"]
    assert {"pip": ["-e ."]} in environment["dependencies"]


@pytest.mark.parametrize("conda", [["python >=3.11"], ["python >=3.11", "pytorch >=2.6"],
                                   ["python >=3.11", "pytorch >=2.6,<2.14", "extra"], ["pytorch >=2.6,<2.14"]])
def test_a_difference_between_the_lists_is_found(conda):
    project = {"dependencies": ["torch>=2.6,<2.14"], "requires-python": ">=3.11"}
    assert differences(project, {"dependencies": conda})
    assert not differences(project, {"dependencies": ["pytorch <2.14,>=2.6", "python >=3.11"]})


def test_the_libraries_the_project_is_named_for_are_all_there():
    names = {split(item)[0] for item in PROJECT["dependencies"]}
    assert names >= set("jupyterlab ipywidgets plotly transformers bitsandbytes torch nbval anywidget".split())
    assert PROJECT["requires-python"] == ">=3.11" and "torch>=2.6,<2.14" in PROJECT["dependencies"]
    assert {"test", "peers", "cluster"} == set(PROJECT["optional-dependencies"])


def test_every_library_the_package_imports_is_listed():
    """Imported anywhere in llmlab/, but for imports that may fail (in try, in suppress) -> listed."""
    listed = {split(item)[0] for item in PROJECT["dependencies"]}
    missing = set()
    for path in (TOP / "llmlab").rglob("*.py"):
        tree = ast.parse(path.read_text())
        blocks = [t for t in ast.walk(tree) if isinstance(t, ast.Try)
                  or isinstance(t, ast.With) and "suppress(ImportError)" in ast.unparse(t.items[0])]
        guarded = {id(n) for block in blocks for line in block.body for n in ast.walk(line)}
        for node in ast.walk(tree):
            if id(node) in guarded:
                continue
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module]
            for name in names:
                library = plain(name.split(".")[0])
                if library not in listed | {plain(n) for n in sys.stdlib_module_names} | {"llmlab", "ipython"}:
                    missing.add(f"{path.relative_to(TOP)} imports {library}")
    assert missing == set()


def test_the_makefile_s_two_commands_and_the_readme_agree():
    make, readme = (TOP / "Makefile").read_text(), (TOP / "README.md").read_text()
    for command in ("lab", "test"):
        assert re.search(rf"^{command}:", make, re.MULTILINE) and f"make {command}" in readme


def test_a_python_that_is_too_old_is_refused_with_one_clear_line(tmp_path):
    old = tmp_path / "python3"
    old.write_text('#!/bin/sh\ncase "$1" in -V) echo Python 3.9.2 ;; *) exit 1 ;; esac\n')
    old.chmod(0o755)
    done = subprocess.run(["make", "-f", TOP / "Makefile", f"PYTHON={old}", "unit"], cwd=tmp_path,
                          capture_output=True, text=True)
    assert done.returncode and "needs Python 3.11 or newer" in done.stdout and "Python 3.9.2" in done.stdout
    assert not (tmp_path / ".venv").exists()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    subprocess.run([sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", out, TOP], check=True,
                   capture_output=True, text=True)
    return next(out.glob("*.whl"))


def test_the_wheel_holds_the_package_its_data_and_its_notebooks_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        sizes = {item.filename: item.file_size for item in archive.infolist()}
    data = [path for path in (TOP / "data").rglob("*") if path.is_file()]
    for source in (*data, *(TOP / "notebooks").rglob("*.ipynb"), *(TOP / "llmlab").rglob("*.py")):
        if any(part.startswith((".", "__pycache__")) for part in source.relative_to(TOP).parts):
            continue
        inside = source.relative_to(TOP).as_posix()
        assert (inside if inside.startswith("llmlab/") else f"llmlab/{inside}") in sizes
    roots = {name.split("/")[0] for name in sizes}
    assert len(roots) == 2 and all(r == "llmlab" or r.endswith(".dist-info") for r in roots)
    assert not [name for name in sizes if "test" in name or "conftest" in name or "checkpoint" in name]
    assert not {name: size for name, size in sizes.items() if size > LARGE}
    assert sum(sizes.values()) < 5 * LARGE


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """An environment of its own with only this wheel; the libraries are seen in the one that runs the tests."""
    home = tmp_path_factory.mktemp("installed")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", home / "venv"], check=True)
    python = home / "venv" / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    where = subprocess.run([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], check=True,
                           capture_output=True, text=True).stdout.strip()
    subprocess.run([sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", "-q", wheel],
                   check=True, capture_output=True, text=True)
    # Behind the installed wheel on sys.path; .pth files in there (an editable llmlab) are not read.
    (Path(where) / "libraries.pth").write_text(str(Path(pytest.__file__).parent.parent) + "\n")
    # The libraries' own shared files lie in the environment that runs the tests; the settings are nobody's.
    settings = {"ServerApp": {"allow_root": True, "port_retries": 0}}
    (home / "settings").mkdir()
    (home / "settings" / "jupyter_server_config.json").write_text(json.dumps(settings))
    env = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "JUPYTER"))}
    env |= {"HOME": str(home), "XDG_CACHE_HOME": str(home / "cache"), "JUPYTER_CONFIG_DIR": str(home / "settings"),
            "JUPYTER_DATA_DIR": str(home / "jupyter"), "IPYTHONDIR": str(home / "ipython"), "JUPYTER_TOKEN": "t",
            "JUPYTERLAB_DIR": f"{sys.prefix}/share/jupyter/lab", "JUPYTER_PATH": f"{sys.prefix}/share/jupyter",
            "JUPYTER_CONFIG_PATH": f"{sys.prefix}/etc/jupyter",
            "PATH": f"{python.parent}{os.pathsep}{os.environ['PATH']}"}

    def run(*command):
        return subprocess.run([python, *command], cwd=home, env=env, capture_output=True, text=True, timeout=120)

    run.python, run.env, run.home = python, env, home
    return run


@pytest.mark.parametrize("name", ["data", "notebooks"])
def test_an_installed_wheel_finds_its_folders_inside_itself(installed, name):
    done = installed("-c", f"import llmlab.places as p; print(p.folder({name!r}))")
    assert done.returncode == 0, done.stderr
    folder = Path(done.stdout.strip())
    assert folder.is_relative_to(installed.home) and folder.parent.name == "llmlab" and any(folder.iterdir())


def test_an_installed_wheel_answers_in_the_shell(installed):
    done = installed("-m", "llmlab", "--help")
    assert done.returncode == 0, done.stderr
    assert {"fit", "size", "mix", "doctor", "fetch", "lab"} <= set(re.findall(r"[a-z]+", done.stdout))
    script = subprocess.run([installed.python.parent / "llmlab", "doctor", "--json"], cwd=installed.home,
                            env=installed.env, capture_output=True, text=True, timeout=120)
    assert script.returncode == 0, script.stderr
    assert json.loads(script.stdout)["versions"]["llmlab"] == llmlab.__version__


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="stops the server with a POSIX signal")
def test_llmlab_lab_starts_from_an_installed_wheel_and_stops_cleanly(installed):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = open(installed.home / "lab.log", "w+")
    lab = subprocess.Popen([installed.python, "-m", "llmlab", "lab", "--no-browser", f"--port={port}"],
                           cwd=installed.home, env=installed.env, stdout=log, stderr=subprocess.STDOUT,
                           start_new_session=True)

    def said():
        log.seek(0)
        return log.read()[-3000:]

    try:
        book = json.loads(served(f"http://127.0.0.1:{port}/api/contents/00_start.ipynb?token=t", lab, said))
        assert book["type"] == "notebook" and book["content"]["cells"] and book["writable"]
        assert b"jupyter-config-data" in served(f"http://127.0.0.1:{port}/lab?token=t", lab, said)
    finally:
        lab.send_signal(signal.SIGTERM)
        try:
            code = lab.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(lab.pid, signal.SIGKILL)
            raise AssertionError(f"it did not stop: {said()}") from None
    assert code in (0, -signal.SIGTERM), said()
    with pytest.raises(OSError), socket.create_connection(("127.0.0.1", port), 1):
        pass
    copies = [p for p in installed.home.rglob("00_start.ipynb") if "site-packages" not in str(p)]
    assert copies, "the notebooks were not copied to a folder of the user's"


def served(url: str, process, said) -> bytes:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # loopback, whatever the proxy settings say
    for _ in range(240):
        if process.poll() is not None:
            raise AssertionError(f"llmlab lab ended with {process.returncode}: {said()}")
        try:
            return opener.open(url, timeout=5).read()
        except OSError:
            time.sleep(0.25)
    raise AssertionError(f"llmlab lab did not answer: {said()}")
