"""Rows to terminal tables: the only place that chooses columns."""
