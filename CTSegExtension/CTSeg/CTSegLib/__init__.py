"""The parts of module CTSeg: scene (MRML <-> values), jobs (the worker's process), install, picker,
templates."""
