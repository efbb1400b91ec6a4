"""The journal: every event on stable storage before anyone is told, and the projections with it."""
