"""From a module to a graph: the only place that knows torch.export."""

from gainstage.capture.capture import capture

__all__ = ["capture"]
