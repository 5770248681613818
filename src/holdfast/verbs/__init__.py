"""The verbs as resumable runs: they divide the work, call the lower layers, store the measurements, and judge them."""
