"""Brain MR: the steps between a head scan and a template, each a plain function that can be called alone.

scan -> strip (mask, HD-BET or SynthStrip) -> bias field (N4) -> scaled -> affine to the template
     -> any model on the template's grid -> labels back on the scan's own voxels, resampled once
"""
