"""Errors of the reports that are the input's fault."""

from firsttoken_compiler.errors import FirsttokenError


class ReportError(FirsttokenError):
    """A run document, or an expression over one, cannot be understood."""
