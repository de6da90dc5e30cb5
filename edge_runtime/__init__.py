"""Edge Runtime: serves pruned and quantized models dependably on a box at the edge."""

__version__ = "0.1.0"
