"""The long description: the README without links that lead nowhere outside of the repository."""

import pathlib
import re

import setuptools

text = (pathlib.Path(__file__).parent / "README.md").read_text()
inside = r"\]\((?!https?:)[^)]*\)"
text = re.sub(rf"!\[[^\]]*{inside}\n", "", text)
setuptools.setup(
    long_description=re.sub(rf"\[([^\]]*){inside}", r"\1", text),
    long_description_content_type="text/markdown",
)
