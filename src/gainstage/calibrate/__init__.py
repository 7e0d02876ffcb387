"""After the draw: one pass over real data that makes the realised levels those of the plan."""

from gainstage.calibrate.calibrate import calibrate
from gainstage.calibrate.result import Calibration, CalibrationRow

__all__ = ["Calibration", "CalibrationRow", "calibrate"]
