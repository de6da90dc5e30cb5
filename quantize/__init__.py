"""Model compression: recipes, passes, evaluation, reports. Stands on edge_runtime."""
