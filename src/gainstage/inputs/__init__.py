"""Statistics of a data set, streamed and reduced across ranks, and the whitening that follows from them."""

from gainstage.inputs.example import Measured, by_name, with_tokens
from gainstage.inputs.measure import measure_inputs
from gainstage.inputs.rows import Features, Patches, Rows, padding_of
from gainstage.inputs.statistics import InputStatistics, TokenStatistics
from gainstage.inputs.whitening import Whitening, output_value, whitening_of

__all__ = [
    "Features",
    "InputStatistics",
    "Measured",
    "Patches",
    "Rows",
    "TokenStatistics",
    "Whitening",
    "by_name",
    "measure_inputs",
    "output_value",
    "padding_of",
    "whitening_of",
    "with_tokens",
]
