"""What a text for people must say, however it says it."""

import re


def says(text, *parts):
    """Has one sentence of the text, or one item of a list or table in it, all of these parts?

    parts: the names, numbers, cause and advice that the sentence is there for.
    """
    sentences = re.split(r"(?<=[.!?])\s+|\n\s*\n|\n(?=\s*[-|#*])", str(text))
    return any(all(part in " ".join(s.split()) for part in parts) for s in sentences)
