"""Text of models and users in Markdown, as every reader of it shows it: without HTML.

GitHub, MLflow's viewer and other readers differ in which HTML they let through, so none is written.
"""

_HARMLESS = frozenset(" +-=.,:;()/")
_UNSEEN = {"\n": "⏎", "\t": "⇥"}
_CHARS = 48


def plain(text: str) -> str:
    """Text that means nothing to Markdown or a browser and stays on one line."""
    return "".join(
        char if char.isalnum() or char in _HARMLESS else f"&#{ord(char)};"
        for char in _visible(text)
    )


def code(text: str, *, chars: int = _CHARS) -> str:
    """Text shown letter by letter, on one line and cut to `chars`; not for tables.

    A fence of backticks is longer than any inside. A text with a backslash before a bar is shown as
    plain text: in a table a bar ends its cell unless a backslash stands before it, and readers do
    not agree on what two backslashes then mean.
    """
    shown = _visible(text if len(text) <= chars else f"{text[:chars]}…")
    if not shown:
        return "(empty)"
    if "\\|" in shown:
        return plain(shown)
    fence = "`"
    while fence in shown:
        fence += "`"
    # One space is taken away on either side, if there is one on both and more than spaces between.
    padded = bool(shown.strip(" ")) and (shown[0] in "` " or shown[-1] in "` ")
    space = " " if padded else ""
    return f"{fence}{space}{shown}{space}{fence}"


def code_cell(text: str) -> str:
    """`code` within a table's row, where bars are escaped."""
    return code(text).replace("|", "\\|")


def row(*cells: str) -> str:
    """One row of a table."""
    return "| " + " | ".join(cells) + " |"


def _visible(text: str) -> str:
    return "".join(c if c.isprintable() else _UNSEEN.get(c, "�") for c in text)
