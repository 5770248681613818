"""Model servers that others wrote, each assessed over HTTP and compared with the same model in the process."""
