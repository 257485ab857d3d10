"""A safetensors folder seen as the GGUF that llama.cpp's converter would make of it: names, keys, vocabulary; no file between.

Facts are those of the converter that comes with llama-cpp-python 0.3.36 (conversion/*.py, gguf-py/gguf/vocab.py).
"""

from .folders import Checkpoint

__all__ = ["Checkpoint"]
