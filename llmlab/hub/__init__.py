"""A Hugging Face style hub, read by range requests: a model's shape from a few hundred kilobytes, nothing downloaded."""

from .client import Client, endpoint, file_url, hf_home, token
from .headers import RangeReader, open_gguf, safetensors_headers
from .listing import HubFile, is_safe_path, list_files, read_json, tree
from .names import HubName, parse_name, pick_gguf

__all__ = ["Client", "HubFile", "HubName", "RangeReader", "endpoint", "file_url", "hf_home", "is_safe_path", "list_files",
           "open_gguf", "parse_name", "pick_gguf", "read_json", "safetensors_headers", "token", "tree"]
