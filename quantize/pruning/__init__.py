"""Removing whole channels from an ONNX graph.

Law of this package: `channels` walks the graph by the `rules` of operators and finds which channels
belong together (`groups`) and what must be cut with them; `choosing` says which go, `cutting` does
it, `work` counts. A node that is not understood freezes the channels that reach it: nothing is
guessed.
"""
