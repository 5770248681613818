"""Measurements that combine provers with attacks."""
