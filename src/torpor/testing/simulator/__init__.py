"""A deterministic simulator of the crash rules: RECOVERY as a world in one thread, with a crash possible at every step.

The rules themselves are torpor.core's; this package models only the mechanism around them. `witness` stands outside
and asserts the invariants. `python -m torpor.testing.simulator` runs it; docs/simulator.md explains it.
"""
