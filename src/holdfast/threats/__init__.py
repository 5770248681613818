"""What an attacker may change: the threat model as text and JSON, and one module for each family of constraints."""
