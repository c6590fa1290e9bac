"""The metrics as `evaluate` modules: `evaluate.load("mmft/metrics/modules/bleu.py")` needs no network.

One import a line in these files: the scanner of `evaluate.load` reads no more than one.
"""
