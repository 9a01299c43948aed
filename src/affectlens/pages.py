"""Pages that need no network and are forbidden to use it: rendering shared by the report and the page of conversations.

Names and texts come from outside. In a page they are text and never markup: everything is escaped, data stands in the page as
JSON that cannot end its script element, and a content security policy allows exactly the scripts that are there.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Callable, Mapping
from importlib import resources
from typing import Any


def render(template: str, *, filters: Mapping[str, Callable[..., Any]] | None = None, **values: Any) -> str:
    """A page from a bundled template.

    In the template, ``embed`` writes data for a script, ``hash`` gives the policy's source expression of a script, ``trusted``
    marks our own scripts as markup, and ``css`` is the shared style sheet.

    Args:
        template: File name in the package's data.
        filters: More filters for the template.
        values: What the template names; anything it names and does not get is an error.

    Example:
        >>> render("browse.html.j2", traces=[], title="a & b", note="", model="", stretch=1, disclaimer="")[:15]
        '<!doctype html>'
    """
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    data = resources.files("affectlens") / "data"
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"embed": lambda value: Markup(_embedded(value)), **(filters or {})}
    environment.globals |= {"trusted": Markup, "hash": _hash}
    css = (data / "report.css").read_text(encoding="utf-8")
    return environment.from_string((data / template).read_text(encoding="utf-8")).render(css=css, **values).lstrip()


def _embedded(value: Any) -> str:
    """JSON that can stand inside a script element: nothing in it can end the element or start a comment."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, sort_keys=True, separators=(",", ":"))
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def _hash(script: str) -> str:
    """The source expression by which a content security policy allows exactly this script."""
    return f"sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}"
