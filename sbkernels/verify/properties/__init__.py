"""What must hold of stick-breaking attention whatever the inputs, as named checks.

lab.py       where a property is checked, and the register of names
forward.py   of out and remainder
backward.py  of gradients, and of both
runs.py      of the way it is run: repeated, in little memory, captured in a graph, on several streams and devices
"""

from . import backward, forward, runs
from .lab import PROPERTIES, Lab, NotHere

__all__ = ["PROPERTIES", "Lab", "NotHere", "backward", "forward", "runs"]
