"""Models behind HTTP: requests, responses, and the count of rows that are sent."""
