"""Pages of stored runs: an index, trends, comparisons and examples, as a read-only server or as static files."""
