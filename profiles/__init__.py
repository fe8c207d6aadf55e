"""Nsight on one case: scripts that record it, and what their reports say. See README.md."""
