"""Weights smaller without loss: what the entropy of their exponents allows, and a codec that comes within a percent of it.

`measure(model)` says what is in the bits of a model's weights; `encode` and `decode` are the codec of one tensor; `save` and
`restore` of safetensors files and folders. For storage: a model is decoded before it runs.
"""

from .coding import Coded, decode, encode
from .measuring import Entropies, Entropy, entropy, measure, of_gaussian
from .storing import Saved, read, restore, save

__all__ = ["Coded", "Entropies", "Entropy", "Saved", "decode", "encode", "entropy", "measure", "of_gaussian", "read", "restore",
           "save"]
