"""A process of its own that fills in chat templates: one JSON line in, one out. Started by templates.py, imports no llmlab.

A template is a program written by strangers. Jinja's sandbox keeps it from Python's insides; that it ends, and how much memory
it takes, can only be bounded from outside.
"""

import json
import sys
from datetime import datetime
from functools import lru_cache

MEMORY = 1 << 30  # bytes of address space, where the system can limit it; the parent watches as well


def _limit() -> None:
    try:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    except (ImportError, ValueError, OSError):  # Windows has none, macOS refuses this one
        pass


@lru_cache(8)
def _compiled(source: str):
    from jinja2 import nodes
    from jinja2.exceptions import SecurityError, TemplateError
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from jinja2.utils import Namespace

    class Generation(Extension):
        """{% generation %} marks what an assistant said, for training; here its text alone counts."""

        tags = {"generation"}

        def parse(self, parser):
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body, lineno=line)

    class Names(Namespace):
        """A namespace without names that Python reserves for its insides."""

        def __init__(*args, **values):
            self, given = args[0], dict(*args[1:], **values)
            for name in given:
                _plain(name)
            Namespace.__init__(self, given)

        def __setitem__(self, name, value):
            _plain(name)
            Namespace.__setitem__(self, name, value)

    class Sandbox(ImmutableSandboxedEnvironment):
        def unsafe_undefined(self, obj, attribute):
            """Jinja makes an undefined value of a forbidden attribute, silent where it is only printed; this says so."""
            raise SecurityError(f"access to {str(attribute)!r} of a {type(obj).__name__} is not allowed")

    def _plain(name):
        if str(name).startswith("_"):
            raise SecurityError(f"the name {name!r} is not allowed in a namespace")

    def refuse(message):
        raise TemplateError(message)

    def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    def make_dict(*args, **values):
        return dict(*args, **values)

    world = Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    world.filters["tojson"] = tojson  # jinja's own escapes for HTML
    world.globals |= {"raise_exception": refuse, "namespace": Names, "dict": make_dict,
                      "strftime_now": lambda form: datetime.now().strftime(form)}
    return world.from_string(source)


def _answer(line: str) -> dict:
    try:
        task = json.loads(line)
        return {"text": _compiled(task["template"]).render(**task["variables"])}
    except MemoryError:
        return {"error": "it takes more memory than a conversation can need"}
    except RecursionError:
        return {"error": "it nests too deep"}
    except Exception as error:  # whatever a stranger's program raises is the answer
        at = f" (line {error.lineno})" if getattr(error, "lineno", None) else ""
        return {"error": f"{type(error).__name__}: {str(error)[:500]}{at}"}


def main() -> None:
    _limit()
    _compiled("")           # imports jinja2 while whoever started this does something else
    for line in sys.stdin:
        answer = _answer(line)
        try:
            said = json.dumps(answer)
        except MemoryError:
            said = json.dumps({"error": "it takes more memory than a conversation can need"})
        sys.stdout.write(said + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
