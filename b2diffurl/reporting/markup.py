"""The pages that a browser shows, the report's and the one for judging images, and the style that they have in common."""

import re
from collections.abc import Mapping
from typing import Any

import jinja2
from markupsafe import Markup, escape

from b2diffurl.runtime.logs import printable, shorten

MAX_LETTERS = 400  # of a prompt that are shown


def render(template: str, values: Mapping[str, Any]) -> bytes:
    """A template of reporting/templates/ as HTML with these values, in UTF-8."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("b2diffurl.reporting"),
        autoescape=True,  # prompts may hold HTML
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
    )
    environment.filters |= {"visible": visible, "breakable": breakable}
    return environment.get_template(template).render(values).encode(errors="replace")


def breakable(text: str) -> Markup:
    """A name as HTML that a line may break behind its separators, and so not within a word: `jpeg_<wbr>compressibility`."""
    return Markup(re.sub(r"(?<=\w)([_/.:]+)(?=\w)", r"\1<wbr>", str(escape(text))))


def visible(text: str, length: int = MAX_LETTERS) -> str:
    """A text for a page: its beginning, with control characters and those that turn the direction of writing as codes."""
    return shorten(printable(text[: length + 1], keep="\n"), length)
