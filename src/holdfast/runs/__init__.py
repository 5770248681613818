"""The verbs as resumable runs: they share out the work, call the floors below, keep what was measured, and judge it."""
