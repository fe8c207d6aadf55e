"""Tuned configs: what they are kept under (keys), and where (store)."""
