"""Checks that a chat template is Jinja as transformers reads it."""

import importlib.util

NOT_CHECKED = "the syntax of chat_template was not checked: jinja2 is not installed"


def checkable() -> bool:
    """Whether jinja2 is installed, without importing it."""
    return importlib.util.find_spec("jinja2") is not None


def fault(template: str) -> str | None:
    """Returns the first syntax error in a template, with its line; None without errors.

    Unknown filters and tests are errors too. Templates are compiled and never run.

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
    import jinja2  # here: most merges have no new template
    from jinja2.ext import Extension

    class Generation(Extension):
        """`{% generation %}`, with which transformers marks the model's own text."""

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
    except SyntaxError as error:  # the Python that Jinja makes is nested too deeply
        return str(error.msg)
    return None
