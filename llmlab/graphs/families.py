"""Which function builds the graph of which architecture."""

from collections.abc import Callable
from dataclasses import dataclass

from ..shapes import ModelSpec
from .decoders import STYLES, decoder
from .ggml import Graph
from .parts import Builder


@dataclass(frozen=True, slots=True)
class Family:
    """`build`: the graph of a model. `kind`: what else tells its layers apart, hashable, by block number.
    `verified`: checked against llama.cpp's own figures."""

    build: Callable[[Builder], Graph]
    kind: Callable[[ModelSpec, int], object] | None = None
    verified: bool = True


FAMILIES: dict[str, Family] = {}


def family(name: str, build: Callable[[Builder], Graph], kind: Callable[[ModelSpec, int], object] | None = None,
           verified: bool = True) -> None:
    """Register the graph of an architecture."""
    FAMILIES[name] = Family(build, kind, verified)


def _register_styles() -> None:
    for name, style in STYLES.items():
        family(name, lambda b, style=style: decoder(b, style), style.kind)


_register_styles()
