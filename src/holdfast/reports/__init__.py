"""Reports of a run: a summary, and all other formats, which are created from the summary."""
