"""The README as a package index shows it. All else stands in pyproject.toml."""

import re
from pathlib import Path

from setuptools import setup

# What is relative leads to a file beside the README, which an index does not have: of a picture, what it shows is left;
# of a link, its words and the file's name.
readme = Path(__file__).with_name("README.md").read_text(encoding="utf-8")
readme = re.sub(r"!\[([^]]*)\]\((?!\w+:)[^)]*\)", r"> \1", readme)
readme = re.sub(r"\[([^]]*)\]\((?!\w+:)([^)]*)\)", r"\1 (`\2`)", readme)

setup(long_description=readme, long_description_content_type="text/markdown")
