"""Wrong implementations the harness has to catch, by name: each is plausible, each has been seen in some kernel or nearly.

mutant.py    what a mutant is, and how one takes the place of a registered backend
wrappers.py  wrong whatever the kernels: what goes into a right backend or comes out of it is changed
switches.py  wrong inside: switches in a test build of a backend's own sources
score.py     runs them through the checks of `sbk verify` until one catches
"""
