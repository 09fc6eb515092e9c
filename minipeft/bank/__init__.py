"""Rows of a batch that use different adapters, in one pass: `use_adapters(model, rows=[...])`."""

from minipeft.bank.bank import LoRABank
from minipeft.bank.by_row import ByRow, Row
from minipeft.bank.serving import refuse_rows, serve_rows, stop_rows
from minipeft.bank.stack import RowStack

__all__ = ["ByRow", "LoRABank", "Row", "RowStack", "refuse_rows", "serve_rows", "stop_rows"]
