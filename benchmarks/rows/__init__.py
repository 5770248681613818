"""One module a row: `WHAT` it shows, and `measured()`, which returns its outcome or raises `Absent`."""
