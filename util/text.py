"""Text that comes from data, made safe to print."""


def printable(text: object, keep: str = "") -> str:
    r"""Write control characters, and bytes that are not UTF-8, as escapes such as \x1b.

    File and class names come from data: raw, they could drive a terminal or break an encoder. Those in `keep` stay.
    """
    return "".join(c if c.isprintable() or c in keep else c.encode("unicode_escape").decode() for c in str(text))
