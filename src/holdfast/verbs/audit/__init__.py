"""The audits: a file for each, with its settings, and the opening of its model and data."""
