"""Shows the example of a docstring as code: the site's parser knows that heading in the plural only."""

import re

import griffe


class DocstringExamples(griffe.Extension):
    """Turns `Example: words` into `Examples:` with the words below."""

    def on_object(self, *, obj, **kwargs):
        """Called for each module, class, function and attribute, before its docstring is parsed."""
        del kwargs  # of other extensions
        if obj.docstring is not None:
            obj.docstring.value = re.sub(
                r"^Example:(?: (.*))?$", _examples, obj.docstring.value, flags=re.M
            )


def _examples(found: re.Match) -> str:
    return "Examples:" + (f"\n  {found[1][0].upper()}{found[1][1:]}:\n" if found[1] else "")
