"""llama.cpp's per-tensor snapshots, out of the source distribution of llama-cpp-python; makes the golden file.

`python tests/peers/llama_snapshots.py` writes tests/golden/snapshot_types.json anew: derived facts, not the text.
"""

import os
import subprocess
import sys
import tarfile
from json import dumps
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from golden_types import PATH, contract, golden, spec_of

from llmlab.formats.mixes import quantizable

VERSION = "0.3.36"
REQUIREMENT = f"llama-cpp-python=={VERSION}"


class NotBrought(Exception):
    """pip could not bring the source distribution."""


def download(folder: Path) -> Path:
    """The source distribution, through the user's own pip (76 MB; pip builds its metadata, nothing else)."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", "llama-cpp-python", "--no-input",
               "--disable-pip-version-check", "--dest", str(folder), REQUIREMENT]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=600,
                          env={**os.environ, "TMPDIR": str(folder)})
    found = list(folder.glob("llama_cpp_python-*.tar.gz"))
    if done.returncode or not found:
        raise NotBrought(f"pip brought no {REQUIREMENT}: {(done.stderr or done.stdout).strip()[-300:]}")
    return found[0]


def snapshots(archive: Path) -> dict[str, dict[str, tuple[str, dict[str, str]]]]:
    """{model: {file type: (default type, {tensor name: type} of exceptions)}}, types in capitals."""
    found = {}
    with tarfile.open(archive) as tar:
        for member in tar:
            path = Path(member.name)
            if path.suffix == ".schema" and path.parent.name == "snapshots":
                found[path.stem] = _parse(tar.extractfile(member).read().decode())
    return dict(sorted(found.items()))


def _parse(text: str) -> dict[str, tuple[str, dict[str, str]]]:
    sections: dict[str, tuple[str, dict[str, str]]] = {}
    for line in text.splitlines():
        if line.startswith("["):
            quant, default = line[1:].split("] ")
            sections[quant] = default.strip().upper(), {}
        elif line.strip() and not line.startswith("#"):
            name, type = line.rsplit(" ", 1)
            sections[quant][1][name] = type.upper()
    return sections


def encode(sections: dict[str, tuple[str, dict[str, str]]]) -> dict[str, dict]:
    """The golden form of one model's snapshot."""
    coded: dict[str, dict] = {}
    for quant, (default, other) in sections.items():
        where: dict[str, dict[str, list[int]]] = {}
        for name, type in other.items():
            _, block, rest = name.split(".", 2) if name.startswith("blk.") else ("", "", name)
            where.setdefault(rest, {}).setdefault(type, []).extend([int(block)] if block else [])
        coded[quant] = {"default": default} | {
            name: {type: contract(sorted(blocks)) for type, blocks in sorted(by_type.items())}
            for name, by_type in sorted(where.items())}
    return coded


def write() -> None:
    """Make the golden file anew; which model is which stays as the file says."""
    import tempfile
    known = golden()["models"]
    with tempfile.TemporaryDirectory() as folder:
        archive = Path(sys.argv[1]) if len(sys.argv) > 1 else download(Path(folder))
        found = snapshots(archive)
    models = {}
    for name, sections in found.items():
        model = {key: known[name][key] for key in ("catalogue", "changes") if key in known[name]}
        cells = sum(map(quantizable, spec_of(model).tensors)) * len(sections)
        models[name] = {**model, "cells": cells, "types": encode(sections)}
    head = {"what": "type of each tensor by model and file type, without an importance matrix; derived facts",
            "source": f"vendor/llama.cpp/tests/snapshots (MIT) in the source distribution of llama-cpp-python {VERSION}"}
    lines = []
    for name, model in models.items():
        rest = ",\n".join(f"   {dumps(quant)}: {dumps(coded, separators=(',', ':'))}"
                          for quant, coded in model["types"].items())
        about = dumps({key: value for key, value in model.items() if key != "types"})[1:-1]
        lines.append(f"  {dumps(name)}: {{{about}, \"types\": {{\n{rest}}}}}")
    PATH.write_text(f"{dumps(head)[:-1]},\n \"models\": {{\n" + ",\n".join(lines) + "}}\n", "utf-8")


if __name__ == "__main__":
    write()
