"""What a run reads: prompts, texts, the model. Whatever is wrong is said in one line."""

import os

from .documents import read_text


def read_prompts(path: str | os.PathLike[str]) -> list[tuple[str | None, str]]:
    """[(complexity or None, prompt)]: a prompt a line, with a label and a TAB before it or not.

    Blank lines are skipped. Raises ValueError for an unknown label or a file without a prompt.
    """
    prompts = []
    for number, line in enumerate(read_text(path, "prompts file").split("\n"), start=1):
        before, tab, after = line.partition("\t")
        label = before.strip() if tab else None
        prompt = after.strip() if tab else line.strip()
        if not prompt and not label:
            continue
        if not prompt:
            raise ValueError(f"prompts file {path}, line {number}: a label without a prompt")
        if label is not None and label not in COMPLEXITIES:
            raise ValueError(
                f"prompts file {path}, line {number}: unknown label {label!r} before the TAB; "
                f"expected {', '.join(COMPLEXITIES)}, or no TAB"
            )
        prompts.append((label, prompt))
    if not prompts:
        raise ValueError(f"prompts file {path} has no prompt in it; expected one on a line")
    return prompts


COMPLEXITIES = ("simple", "medium", "complex", "technical")
