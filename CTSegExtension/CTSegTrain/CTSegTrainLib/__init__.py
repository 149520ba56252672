"""The parts of module CTSegTrain: cases, names, files of a training, its process, curves, and what came of
it."""
