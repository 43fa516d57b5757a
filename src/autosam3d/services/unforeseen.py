"""What Python raises where nobody foresaw it: a service ends the one scan with it and goes on with the next."""

from __future__ import annotations

UNFORESEEN = (ArithmeticError, AssertionError, AttributeError, LookupError, MemoryError, RuntimeError, TypeError,
              ValueError)
"""RuntimeError is also Python's word for a system that allows no more threads. Who catches these tells the class alone:
a message may quote what was sent."""
