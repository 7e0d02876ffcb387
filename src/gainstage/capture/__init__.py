"""From a module to a graph: the only place that knows torch.export."""

from gainstage.capture.capture import capture
from gainstage.capture.surroundings import copied

__all__ = ["capture", "copied"]
