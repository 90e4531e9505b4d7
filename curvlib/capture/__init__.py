"""Capture: which call uses which parameter, and what flows through it."""

from curvlib.capture.engines import execute
from curvlib.capture.plan import Plan, Site
from curvlib.capture.planning import plan

__all__ = ["Plan", "Site", "execute", "plan"]
