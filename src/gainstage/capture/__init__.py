"""From a module to a graph: the only place that knows torch.export."""

from gainstage.capture.capture import capture
from gainstage.capture.surroundings import copied, past_kept

__all__ = ["capture", "copied", "past_kept"]
