"""Whether a chat template is Jinja, as transformers reads it."""

import importlib.util

NOT_CHECKED = "the syntax of chat_template was not checked, which needs jinja2"


def checkable() -> bool:
    """Whether jinja2 is installed, without importing it."""
    return importlib.util.find_spec("jinja2") is not None


def fault(template: str) -> str | None:
    """The first error of syntax in a template, with its line; None if it has none.

    Filters and tests that Jinja does not know are errors too. Templates are compiled
    and never run.

    Args:
      template: the template.

    Raises:
      ImportError: jinja2 is not installed; see `checkable`.

    Example:
      >>> fault("{% for message in messages %}{{ message.content }}")
      "line 1: Unexpected end of template. Jinja was looking for the following tags: \
'endfor' or 'else'. The innermost block that needs to be closed is 'for'."
      >>> fault("{{ messages[0].content | trim }}")
    """
    import jinja2  # here: most merges have no template of their own
    from jinja2.ext import Extension

    class Generation(Extension):
        """`{% generation %}`, by which transformers marks what the model says."""

        tags = {"generation"}

        def parse(self, parser):
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    environment = jinja2.Environment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=["jinja2.ext.loopcontrols", Generation],
    )
    try:
        environment.compile(template)
    except jinja2.TemplateSyntaxError as error:
        return f"line {error.lineno}: {error.message}"
    except SyntaxError as error:  # of the Python that Jinja makes: nested too deeply
        return str(error.msg)
    return None
