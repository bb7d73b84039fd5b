"""One self-contained HTML file."""


def report() -> None:
    """Placeholder until the views exist."""
