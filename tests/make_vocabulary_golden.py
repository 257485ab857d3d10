"""Makes tests/golden/vocabulary.json: the tokens llama.cpp gives for TEXTS in every small vocabulary and in SmolLM2's file.

Run as `python tests/make_vocabulary_golden.py` where llama-cpp-python is installed (the extra `peers`).
"""

import hashlib
import json
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE / "peers")]

from llama_engine import llama_cpp  # noqa: E402
from llama_vocabulary import live  # noqa: E402
from vocabularies import TEXTS, cases, put  # noqa: E402

from llmlab.sources import fetch  # noqa: E402

GOLDEN = HERE / "golden" / "vocabulary.json"


def said(path: Path) -> dict:
    with live(path) as peer:
        plain = [peer.tokens(text, False, False) for text in TEXTS]
        special = [peer.tokens(text, True, True) for text in TEXTS]
        pieces = "\0".join(peer.piece(number).hex() for number in range(peer.count))
        return {"plain": plain, "special": {place: ids for place, ids in enumerate(special) if ids != plain[place]},
                "ends": [number for number in range(peer.count) if peer.ends(number)],
                "pieces": hashlib.sha256(pieces.encode()).hexdigest()}


def golden() -> dict:
    """What the installed llama.cpp says today."""
    with tempfile.TemporaryDirectory() as folder:
        found = {name: said(put(Path(folder), metadata)) for name, metadata in cases().items()}
    return found | {"SmolLM2": said(fetch("smollm2-135m", progress=False))}


if __name__ == "__main__":
    found = golden()
    version = f"llama-cpp-python {llama_cpp.__version__}"
    lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(case, separators=(',', ':'))}" for name, case in found.items())
    GOLDEN.write_text(f'{{"made with": {json.dumps(version)},\n{lines}}}\n')
    print(GOLDEN, GOLDEN.stat().st_size, "bytes")
