"""Implementations of the operator: one file each, listed in sbkernels/registry.py, all with the interface of base.Backend."""
