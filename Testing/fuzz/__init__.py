"""Hostile input: mutated files of every kind that is read here, through the public functions that read them.

`python -m fuzz` (with Testing on the path) runs all families and writes Testing/data/reliability/fuzz.json.
"""
