"""Torch modules built on mmft.functional: attention, Monte Carlo dropout, fusion of modalities, reward heads.

Shape suffixes beside those of `mmft.types`: N tokens (of one modality, or of all in a row), Q queries, K keys; D is the
feature size of what the line speaks of.
"""
