"""The one timer, and what is measured with it: errors and times of a few problems, speed on sets of problems, softplus."""
