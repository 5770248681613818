"""Threat models of tables: rules that the columns of a valid row obey, and how far an attacker may move a row."""
