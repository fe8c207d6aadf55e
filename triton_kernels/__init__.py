"""Triton kernels of stick-breaking attention.

step.py               the math of one tile, both formulations: every kernel calls it
tiles.py              sequences, tile loads and stores, logits
forward.py            out, remainder and the backward's starting state
backward_queries.py   dq, and the state per (row, key tile)
backward_keys.py      dk and dv
ahead_of_time.py      compiles a launch for a GPU that is not there, and reads registers, spills and shared memory
"""
