"""A griffe extension: docstrings as help() shows them, brought into the form of the pages.

griffe reads the docstrings for mkdocstrings. In NumPy's style a section lasts until the next
heading, so a paragraph behind the parameters would be taken for one more parameter.
"""

import re

import griffe

# (what stands in a docstring, what the pages want in its place)
CHANGES = [
    (r" *# doctest: \+SKIP", ""),
    (r":\w+:`([\w.]+)`", r"`\1`"),
    (r"<(\w+)>", r"`<\1>`"),
    (r"^( *)Example\n *-------$", r"\1Examples\n\1--------"),
    (r"^( *)(?=Source: )", r"\1Notes\n\1-----\n\1"),
    (r"^( *)Columns\n *-------$", r"\1**Columns**\n"),
    # griffe takes the first of {"a", "b"} for the default; of words, that of the signature.
    (r"^( *\w+ : )\{([^{}:]+)\}", r"\1one of \2"),
    # The list of routers in the help of patch: as code, line by line.
    (r"^(?=\w+ \(\w+\); max_k None is |  [* ] \w+ = \S+: )", "    "),
]
SECTION = re.compile(r"^ *---+$", re.M)
# "name : what it is", of the fields of a small class: an item of a list.
FIELD = re.compile(r"^(\w+(?:, \w+)*) : ", re.M)
# What a class attribute has of its type, and a field of a named tuple: it tells nothing.
BUILTIN = {kind.__doc__ for kind in (bool, dict, float, int, list, str, tuple, type(None))}
ALIAS = "Alias for field number"


class Docstrings(griffe.Extension):
    """Changes every docstring once it has been read."""

    def on_object(self, *, obj, **kwargs):
        if obj.docstring is None:
            return
        if obj.docstring.value in BUILTIN or obj.docstring.value.startswith(ALIAS):
            obj.docstring = None
            return
        for pattern, new in CHANGES:
            obj.docstring.value = re.sub(pattern, new, obj.docstring.value, flags=re.M)
        if not SECTION.search(obj.docstring.value):
            obj.docstring.value = FIELD.sub(r"- `\1`: ", obj.docstring.value)
