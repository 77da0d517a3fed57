"""Reports of a run: the document, tables, listing, trace, page and comparison; read `document.py` first."""
