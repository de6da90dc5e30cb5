"""Device profiles: what a board is and how to use it. The leaf of the import tree.

`loading` reads profiles, `probe` looks at the machine, `matching` chooses, `checking` compares.
"""
