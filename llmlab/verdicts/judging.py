"""Claims judged: every part against its number as it is now, a verdict from the parts, a sentence from the numbers."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from html import escape
from textwrap import wrap

from ..catalog import Listed, Table
from ..errors import LabError
from .numbers import Figure, figures
from .reading import Claim, Part, stated

HEAD = ("claim", "verdict", "by which numbers", "run it")
_NAME = re.compile(r"\{([\w.-]+)\}")


@dataclass(frozen=True, repr=False)
class Judged:
    """A claim and its numbers as of now."""

    claim: Claim
    figures: dict[str, Figure]

    @cached_property
    def parts(self) -> tuple[tuple[Part, bool | None], ...]:
        """Each part, and whether it holds; None where nobody has the number."""
        return tuple((part, part.decided(self._figure(part.number).value) if part.number else None)
                     for part in self.claim.parts)

    @property
    def verdict(self) -> str:
        """By the parts: all of what the claim says holds, or some of it, or nothing; or a condition fails."""
        said = [held for part, held in self.parts if not part.beyond]
        if all(said):
            return "true" if all(held for part, held in self.parts if part.beyond) else "true, with a condition"
        if any(said):
            return "half true"
        return "not shown here" if None in said else "false"

    @property
    def answer(self) -> str:
        """The sentence, with the numbers as they are now."""
        return _NAME.sub(lambda found: self._figure(found[1]).text, self.claim.answer)

    @property
    def named(self) -> dict[str, Figure]:
        """The figures that decide the parts or stand in the sentence."""
        wanted = dict.fromkeys([*(part.number for part in self.claim.parts if part.number), *_NAME.findall(self.claim.answer)])
        return {name: self._figure(name) for name in wanted}

    def _figure(self, name: str) -> Figure:
        if name not in self.figures:
            raise LabError(f"data/claims.json: {self.claim.id} has no number {name!r}; it has {', '.join(self.figures)}")
        return self.figures[name]

    def to_dict(self) -> dict:
        """For `llmlab claims --json`."""
        c = self.claim
        return {"id": c.id, "claim": c.claim, "from": c.origin, "verdict": self.verdict, "answer": self.answer,
                "notebook": f"notebooks/{c.notebook}.ipynb",
                "parts": [{"says": part.says, "number": part.number, "bound": part.bound, "beyond": part.beyond, "holds": held}
                          for part, held in self.parts],
                "numbers": {name: {"value": one.value, "text": one.text, "kind": one.kind, "source": one.source}
                            for name, one in self.named.items()}}

    def __repr__(self) -> str:
        lines = wrap(self.answer, 116, initial_indent="    ", subsequent_indent="    ")
        return "\n".join([f"{self.verdict.upper()}: {self.claim.claim}", *lines, f"    ({self.claim.notebook})"])


class Claims(Listed):
    """Judged claims in their order; shown as text, or as a table with links to the notebooks."""

    def __init__(self, rows: Sequence[Judged]):
        super().__init__(rows)

    @property
    def table(self) -> Table:
        """A row a claim."""
        return Table({"claim": one.claim.claim, "verdict": one.verdict, "numbers": one.answer, "notebook": one.claim.notebook}
                     for one in self)

    def markdown(self, notebooks: str = "notebooks/") -> str:
        """The table for a README; `notebooks`: the folder that links lead to."""
        rows = [f"| {one.claim.claim} | **{one.verdict}** | {one.answer} | [{one.claim.notebook}]"
                f"({notebooks}{one.claim.notebook}.ipynb) |" for one in self]
        return "\n".join([f"| {' | '.join(HEAD)} |", "|---|---|---|---|", *rows]) + "\n"

    def __repr__(self) -> str:
        return "\n".join(map(repr, self))

    def _repr_html_(self) -> str:
        head = "".join(f'<th style="text-align:left">{name}</th>' for name in HEAD)
        body = "".join(
            '<tr>' + "".join(f'<td style="text-align:left;vertical-align:top">{text}</td>' for text in (
                escape(one.claim.claim), f"<b>{escape(one.verdict)}</b>", escape(one.answer),
                f'<a href="{one.claim.notebook}.ipynb">{one.claim.notebook}</a>')) + "</tr>" for one in self)
        return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def claims() -> Claims:
    """The claims of 2024 about running language models at home, judged now: everything that can be is computed anew, which
    takes a second or two. Raises LabError where data/claims.json says what cannot be done.

        llmlab.claims()[1].verdict, llmlab.claims().table
    """
    return Claims([Judged(claim, figures(claim.numbers)) for claim in stated()])
