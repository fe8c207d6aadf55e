"""The differential harness: every backend against the float64 reference.

inputs.py      regimes of logits, memory layouts, and cases that combine them
tolerance.py   the same-precision baseline and the one comparator
properties/    what must hold whatever the inputs, by name
run.py         registry x cases x dtypes, findings, summary
mutants/       wrong implementations that all of this has to catch
fuzz.py        random problems, and the smallest that still fails
sanitize.py    compute-sanitizer over a fixed set of problems
stress.py      the same bits again and again under load
report.py      counts, worst errors and coverage of a run, as JSON and HTML
record.py      what was verified where, and whether that still describes these sources
"""
