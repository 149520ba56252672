"""Hostile input: mutated files of every kind that is read here, each through the public function that reads it.

`python -m fuzz` (with Testing on the path) runs all families and writes Testing/data/reliability/fuzz.json.
"""
