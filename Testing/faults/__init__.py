"""Faults made on purpose, and what is left after each: `python -m faults` with Testing on the path.

    jobs (a command, a folder it works in) --engine--> forked child, disturbed (steps, limits, kills)
      --judge--> the user's files, the results, the two lines, the repeated command --> table

Each file named after a family makes its faults; `__main__` runs them and writes the table.
"""
