"""Scripts that are run beside training: predict, draw, check a dataset, measure speed.

Each runs from any folder as `python path/to/tools/NAME.py`. Python then puts `tools/`, and not the repository, on its
search path, so each script starts by adding the repository with one line.
"""
