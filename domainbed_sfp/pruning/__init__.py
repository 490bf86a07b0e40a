"""Pruning, in separate parts: scores rate units, schedules say how many may live, masks are what results.

`structure` finds the units (channels) of a network and `accounting` counts what is left of it.
"""
