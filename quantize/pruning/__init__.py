"""Removing whole channels from an ONNX graph.

Law of this package: `channels` finds which channels belong together and what must be cut with them,
`importance` and `choosing` say which go, `cutting` does it, `work` counts. A node that is not
understood freezes the channels that reach it: nothing is guessed.
"""
