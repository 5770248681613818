"""Policies under attack: environments, policies, attackers, training and certified actions."""
