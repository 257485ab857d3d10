"""Makes data/config_defaults.json: what transformers assumes for a field that a saved config.json leaves out.

Run as `python tests/make_config_defaults.py` after llmlab/hf_config.py learnt a field or transformers moved on.
A class default is recorded only where it stands on its own: what a class computes from other fields
(layer_types, a head_dim of None, num_key_value_heads of None, "auto") is left to llmlab.hf_config.
"""

import ast
import json
import os
import sys
from inspect import getsource
from pathlib import Path
from textwrap import dedent

from llmlab import hf_config

TABLE = Path(__file__).resolve().parent.parent / "data" / "config_defaults.json"
READERS = {"raw", "number", "flag", "listed"}   # the methods of hf_config.Config that name a field
# Rotary settings are rewritten while a class is made, and layer lists depend on the number of layers.
NEVER = {"rope_parameters", "rope_scaling", "partial_rotary_factor", "rotary_pct", "layer_types", "layers_block_type",
         "hybrid_override_pattern"}
SIZES = ("num_hidden_layers", "n_layer", "hidden_size", "n_embd", "num_attention_heads", "n_head", "num_heads")


def names_read() -> set[str]:
    """The config fields that llmlab/hf_config.py asks for by name."""
    calls = (node for node in ast.walk(ast.parse(getsource(hf_config))) if isinstance(node, ast.Call))
    return {argument.value for call in calls if isinstance(call.func, ast.Attribute) and call.func.attr in READERS
            for argument in call.args if isinstance(argument, ast.Constant) and isinstance(argument.value, str)}


def text_class(model_type: str):
    """The configuration class that describes the language model of `model_type`; None where transformers has none."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    if model_type not in CONFIG_MAPPING:
        return None
    found = CONFIG_MAPPING[model_type]
    if inner := found.sub_configs_defaults.get("text_config"):
        return CONFIG_MAPPING[inner.model_type]
    return found


def class_defaults(found, names: set[str]) -> dict:
    """Field -> default of a configuration class, for the fields in `names` whose default depends on no other field."""
    alias = found.attribute_map
    declared = found.default_config_fields()
    own = {name: value for name, value in declared.items()
           if name in names - NEVER and alias.get(name, name) not in declared.keys() - {name}
           and isinstance(value, (bool, int, float, str)) and value != "auto"}
    doubled = {name: 2 * own[name] for name in SIZES if name in own}
    plain, changed = vars(found()), vars(found(**doubled))
    stands = {name: value for name, value in own.items()
              if _is(plain.get(alias.get(name, name)), value)
              and _is(changed.get(alias.get(name, name)), doubled.get(name, value))}
    return {name: value for name, value in keyword_defaults(found).items() if name in names - NEVER} | stands


def _is(found, value) -> bool:
    """Whether an attribute is `value`, or `value` for each layer."""
    return found == value or (isinstance(found, list) and bool(found) and all(entry == value for entry in found))


def keyword_defaults(found) -> dict:
    """What a class's __post_init__ assumes for keywords that are no fields: kwargs.pop("global_head_dim", 512)."""
    calls = (node for node in ast.walk(ast.parse(dedent(getsource(found.__post_init__)))) if isinstance(node, ast.Call))
    return {call.args[0].value: call.args[1].value for call in calls
            if isinstance(call.func, ast.Attribute) and isinstance(call.func.value, ast.Name)
            and call.func.value.id == "kwargs" and len(call.args) == 2
            and all(isinstance(argument, ast.Constant) for argument in call.args) and call.args[1].value is not None}


def make() -> dict:
    """The whole table."""
    import transformers
    names = names_read()
    classes = {model_type: text_class(model_type) for model_type in hf_config.ARCHITECTURES}
    return {"transformers": transformers.__version__,
            "source": "defaults of transformers' configuration classes (Apache-2.0), by tests/make_config_defaults.py",
            "model_types": {model_type: dict(sorted(class_defaults(found, names).items()))
                            for model_type, found in sorted(classes.items()) if found is not None}}


def text(table: dict) -> str:
    """The table as JSON with one model_type a line."""
    rows = ",\n".join(f"  {json.dumps(name)}: {json.dumps(fields)}" for name, fields in table["model_types"].items())
    head = "".join(f"{json.dumps(key)}: {json.dumps(table[key])},\n " for key in ("transformers", "source"))
    return f'{{{head}"model_types": {{\n{rows}\n }}}}\n'


if __name__ == "__main__":
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    made = text(make())
    TABLE.write_text(made, "utf-8")
    sys.stdout.write(f"{TABLE.name}: {made.count('{') - 2} model types, {len(made)} bytes\n")
