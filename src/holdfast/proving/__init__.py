"""Combines provers with attacks: decides queries about networks, and measures the geometry of decision boundaries."""
