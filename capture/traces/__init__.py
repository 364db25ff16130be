"""Routing that other programs recorded: read, cleaned, and written as a run file.

sequences  what a trace holds, and what has to be found out before it can be stored
formats    which program wrote a file, and the reader for each
tables     rows of (request, token, layer) in any order, put in order by DuckDB
importing  ``import_routing``: from a source to a run file

May be imported by what stands above the store; nothing here loads a model or torch.
"""

from capture.traces.importing import Imported, import_routing

__all__ = ["Imported", "import_routing"]
