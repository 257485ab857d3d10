"""The GGUF container file: a header that says what the tensors are, then the tensors' bytes.

A header comes from strangers. Every length in it is held against what is left of the file before anything
is allocated, counts and nesting are bounded, and a vocabulary is walked, not decoded. The header is read
through one small moving window with ordinary reads: a file cut short under us is then one clear error,
where a memory map would end the process.
"""

from .contents import Array, GGUFFile
from .header import read_header
from .layout import TensorInfo
from .sets import join_shards, read_gguf, shard_names
from .walker import Reader
from .writing import write_gguf

__all__ = ["Array", "GGUFFile", "Reader", "TensorInfo", "join_shards", "read_gguf", "read_header", "shard_names",
           "write_gguf"]
