"""Rows of a batch that use different adapters, in one pass: `use_adapters(model, rows=[...])`."""

from minipeft.layers.by_row import Row
from minipeft.model.rows.serving import refuse_rows, serve_rows, stop_rows
from minipeft.model.rows.stack import RowStack

__all__ = ["Row", "RowStack", "refuse_rows", "serve_rows", "stop_rows"]
