"""Scripts with cells (the percent format) as Markdown."""

import re


def markdown(script: str) -> str:
    """Text cells as they are, and code cells as blocks of code.

    Args:
      script: the text of the script. What stands before its first cell is left out.
    """
    parts = []
    for cell in re.split(r"^# %%", script, flags=re.MULTILINE)[1:]:
        kind, _, body = cell.partition("\n")
        if "[markdown]" in kind:
            parts.append(re.sub(r"^# ?", "", body, flags=re.MULTILINE).strip())
        elif body.strip():
            parts.append(f"```python\n{body.strip()}\n```")
    return "\n\n".join(parts) + "\n"
