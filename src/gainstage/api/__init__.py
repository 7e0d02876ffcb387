"""The public functions: each is one walk through the stages, and adds to errors what the user asked for."""

from gainstage.api.checking import calibrate, verify
from gainstage.api.planning import initialize, measure_inputs, plan
from gainstage.api.predict import inspect, task_gradients
from gainstage.api.present import measured_input, moments_of, on_host
from gainstage.apply import apply, tailor
from gainstage.signal.gain import gain

__all__ = [
    "apply",
    "calibrate",
    "gain",
    "initialize",
    "inspect",
    "measure_inputs",
    "measured_input",
    "moments_of",
    "on_host",
    "plan",
    "tailor",
    "task_gradients",
    "verify",
]
