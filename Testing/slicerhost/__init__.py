"""Runs scripted modules of 3D Slicer without the application: real Qt widgets on the real MRML scene.

`boot.start()` gives the application object; `modules.load_scripted_module(path)` loads a module file as
Slicer's factory does. What is not as in Slicer is listed in README.md beside this file.
"""
